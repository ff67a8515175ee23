"""Which model is fine-tuned: tokenizer, classifier and its LoRA modules.

Everything new in a model (head, LoRA factors) is drawn from a ``torch.Generator`` of its
own, so a seed gives the same bits in every process, whatever ran there before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedlora_app import packaged
from fedlora_app.config import LoraConfig, ModelConfig
from fedlora_app.onnx_weights import read_bert

if TYPE_CHECKING:
    from peft import PeftModel

# Where classifiers keep what must be trained in full, and attention its query and value.
HEADS = ("classifier", "score", "pre_classifier")
TARGETS = (
    ("query", "value"),  # BERT, RoBERTa, ELECTRA
    ("q_proj", "v_proj"),  # Llama, Mistral, Qwen, OPT, ViT
    ("q_lin", "v_lin"),  # DistilBERT
    ("query_proj", "value_proj"),  # DeBERTa
    ("c_attn",),  # GPT-2
    ("query_key_value",),  # BLOOM, Falcon, GPT-NeoX
    ("Wqkv",),  # ModernBERT
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class ClassifierOutput:
    """What ``MeanPoolClassifier`` returns: ``logits`` (batch, labels), scalar ``loss``."""

    logits: Tensor
    loss: Tensor | None = None


class MeanPoolClassifier(nn.Module):
    """Classify the mean of an encoder's last hidden states.

    Sentence-transformers models were trained for this mean; their first token, which
    the stock heads read, means little.

    Parameters
    ----------
    encoder : nn.Module
        A ``transformers.AutoModel``.
    num_labels : int
        Width of the logits.
    """

    def __init__(self, encoder: nn.Module, num_labels: int) -> None:
        super().__init__()
        config: Any = encoder.config
        self.config = config
        self.encoder = encoder
        self.dropout = nn.Dropout(_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, num_labels)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> ClassifierOutput:
        """Return the logits, and the mean cross-entropy if ``labels`` (batch,) are given."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        # In float32 also when the encoder is bfloat16: a sum over many tokens loses digits.
        mask = attention_mask.unsqueeze(-1).float()
        mean = (states.float() * mask).sum(1) / mask.sum(1).clamp(min=1)
        logits = self.classifier(self.dropout(mean))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return ClassifierOutput(logits, loss)


def build_tokenizer(config: ModelConfig) -> Any:
    """Return the tokenizer of the model, with a padding token.

    Parameters
    ----------
    config : ModelConfig
        Its ``name`` is a packaged model, a local folder or a Hugging Face id.

    Raises
    ------
    FileNotFoundError
        If the model cannot be found.
    ValueError
        If a packaged model does not exist, or the tokenizer can pad with nothing.
    """
    from transformers import AutoTokenizer

    source, local = _source(packaged.tokenizer_name(config.name))
    with _loading(config.name, local):
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
    if tokenizer.pad_token_id is None:  # decoders
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer of {config.name!r} has neither a padding nor an end token; "
                "give it a pad_token and save it in a local folder"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_model(
    config: ModelConfig, *, num_labels: int, seed: int, precision: str = "float32"
) -> nn.Module:
    """Return a sequence classifier: ``model(input_ids, attention_mask, labels=None)``.

    Parameters
    ----------
    config : ModelConfig
        Its ``name`` is a packaged model, a local folder or a Hugging Face id. Its head
        ``auto`` is ``mean-pool`` for sentence-transformers folders (``modules.json`` or
        ``1_Pooling``) and for ids that say ``sentence-transformers/`` or ``MiniLM``, else
        ``stock``.
    num_labels : int
        Width of the logits, at least 2.
    seed : int
        Decides the weights that the checkpoint lacks: normal with the model's
        ``initializer_range``, biases zero.
    precision : {"float32", "bfloat16"}
        Type of the pretrained weights; the head is float32 always. A bfloat16 model has
        to run under ``torch.autocast`` (default: "float32").

    Returns
    -------
    nn.Module
        In evaluation mode; its output has ``.logits`` (batch, num_labels) and ``.loss``.

    Raises
    ------
    FileNotFoundError
        If the model cannot be found.
    ValueError
        If ``num_labels``, ``precision`` or the name of a packaged model is wrong.
    """
    if num_labels < 2:
        raise ValueError(f"num_labels: expected at least 2, got {num_labels}")
    if precision not in DTYPES:
        raise ValueError(f"precision: expected one of {', '.join(DTYPES)}; got {precision!r}")
    source, local = _source(config.name)
    # No pickled checkpoints: loading one can run code.
    options = {
        "dtype": DTYPES[precision],
        "use_safetensors": True,
        "local_files_only": local,
    }
    model: nn.Module
    with _loading(config.name, local), _untouched_rng():
        if _head(config, source) == "mean-pool":
            encoder, lacking = _pretrained(source, num_labels, head=False, **options)
            model = MeanPoolClassifier(encoder, num_labels)
            fresh = ["classifier.weight", "classifier.bias", *(f"encoder.{n}" for n in lacking)]
        else:
            model, fresh = _pretrained(source, num_labels, head=True, **options)
    for name in _head_names(model):
        getattr(model, name).float()
    _initialise(model, fresh, seed)
    if hasattr(model, "score"):
        # Decoders classify at the last token that is not padding: agree on what padding is.
        settings: Any = model.config
        settings.pad_token_id = build_tokenizer(config).pad_token_id
    return model.eval()


def add_lora(model: nn.Module, config: LoraConfig, *, rank: int, seed: int) -> PeftModel:
    """Put LoRA modules into ``model`` (in place) and make them and the head trainable.

    Parameters
    ----------
    model : nn.Module
        From ``build_model``.
    config : LoraConfig
        Scale, target modules, dropout, DoRA. Targets ``auto`` are the query and value
        projections.
    rank : int
        Rank of every LoRA module; alpha is ``config.scale * rank``.
    seed : int
        Decides the A factors (Kaiming uniform as in PEFT); B starts at zero.

    Returns
    -------
    PeftModel
        Trainable weights are float32 whatever the type of the frozen ones.

    Raises
    ------
    ValueError
        If the rank is below 1, or target modules are unknown or cannot be detected.
    """
    import peft

    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    heads = _head_names(model)
    if not heads:
        raise ValueError(
            f"{type(model).__name__} has no classification head under any of the names "
            f"{', '.join(HEADS)}; set model.head = 'mean-pool' or name another model"
        )
    layers = _projections(model, heads)
    targets = _targets(config.target_modules, set(layers))
    with _untouched_rng():
        peft_model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=rank,
                lora_alpha=config.scale * rank,
                target_modules=targets,
                modules_to_save=heads,
                lora_dropout=config.dropout,
                use_dora=config.dora,
                # GPT-2 stores its projections transposed, in a class of its own.
                fan_in_fan_out=any(type(layers[name]).__name__ == "Conv1D" for name in targets),
            ),
        )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if ".lora_A." in name:
            start = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
            with torch.no_grad():
                parameter.copy_(start)
    return peft_model


def _source(name: str) -> tuple[str, bool]:
    """Return the folder, packaged ONNX file or hub id to load, and whether it is local."""
    if name.startswith(packaged.PREFIX):
        return str(packaged.model_path(name)), True
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path), True
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(
            f"model.name: expected a folder with a model, but {path.absolute()} is none; "
            "correct the path or name a Hugging Face model id"
        )
    return name, False


def _pretrained(
    source: str, num_labels: int, *, head: bool, **options: Any
) -> tuple[Any, list[str]]:
    """Return the model, with its stock head or none, and the weights the checkpoint lacks."""
    import transformers

    kind: Any
    checkpoint: dict[str, Any]
    if source.endswith(".onnx") and Path(source).is_file():
        settings, weights = read_bert(Path(source))
        settings.num_labels = num_labels
        # The Auto classes insist on a path.
        kind = transformers.BertForSequenceClassification if head else transformers.BertModel
        path, checkpoint = None, {"config": settings, "state_dict": weights}
    else:
        kind = transformers.AutoModelForSequenceClassification if head else transformers.AutoModel
        path, checkpoint = source, {"num_labels": num_labels}
    model, info = kind.from_pretrained(
        path,
        ignore_mismatched_sizes=head,  # a head of another width is replaced
        output_loading_info=True,
        **checkpoint,
        **options,
    )
    return model, [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]


def _head(config: ModelConfig, source: str) -> str:
    if config.head != "auto":
        return config.head
    folder = Path(source)
    pooled = (folder / "modules.json").exists() or (folder / "1_Pooling").exists()
    named = config.name.startswith("sentence-transformers/") or "minilm" in config.name.lower()
    return "mean-pool" if pooled or named else "stock"


def _head_names(model: nn.Module) -> list[str]:
    return [name for name in HEADS if isinstance(getattr(model, name, None), nn.Module)]


def _dropout(config: Any) -> float:
    for name in ("classifier_dropout", "hidden_dropout_prob", "dropout"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    return 0.0


def _initialise(model: nn.Module, names: Iterable[str], seed: int) -> None:
    """Fill the named parameters from a generator of their own, in the order of their names."""
    config: Any = model.config
    std = getattr(config, "initializer_range", 0.02)
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in sorted(set(names) & set(parameters)):
            parameter = parameters[name]
            if parameter.ndim > 1:
                parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator))
            else:  # the weight of a norm, or a bias
                parameter.fill_(1.0 if name.endswith(".weight") else 0.0)


def _projections(model: nn.Module, heads: list[str]) -> dict[str, nn.Module]:
    """Return the linear layers outside the head by the last part of their names."""
    return {
        path.rsplit(".", 1)[-1]: module
        for path, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and path.split(".", 1)[0] not in heads
    }


def _targets(wanted: str, layers: set[str]) -> list[str]:
    if wanted == "auto":
        for names in TARGETS:
            if layers.issuperset(names):
                return list(names)
        problem = "cannot tell the query and value projections of this model"
    else:
        chosen = [name.strip() for name in wanted.split(",")]
        unknown = [name for name in chosen if name not in layers]
        if not unknown:
            return chosen
        problem = f"no linear layer is called {', '.join(map(repr, unknown))}"
    raise ValueError(
        f"lora.target-modules = {wanted!r}: {problem}; name some of: {', '.join(sorted(layers))}"
    )


@contextmanager
def _untouched_rng() -> Iterator[None]:
    # transformers and PEFT draw from torch's global generator and take no other. What they
    # draw is overwritten, and the caller's stream must not depend on how much it was.
    with torch.random.fork_rng(devices=[]):
        yield


@contextmanager
def _loading(name: str, local: bool) -> Iterator[None]:
    """Load without progress bars, and say what to do when that fails."""
    from transformers.utils import logging

    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # "Some weights are newly initialized" is the purpose here, not a warning.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        if local:
            wanted = (
                f"the files that `{packaged.INSTALL}` installs"
                if name.startswith(packaged.PREFIX)
                else "a folder with config.json, tokenizer files and *.safetensors"
            )
            raise FileNotFoundError(
                f"model.name = {name!r}: expected {wanted}, but loading failed: {reason}"
            ) from error
        if isinstance(error, ValueError):  # reached, but of a kind that transformers refuses
            raise
        raise FileNotFoundError(
            f"model.name = {name!r} is no local folder, and the Hugging Face Hub did not provide "
            f"it: {reason} Name a local folder, use 'packaged:minilm-l6', or run `hf download "
            f"{name}` where there is a network and set HF_HOME to that cache and HF_HUB_OFFLINE=1"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()
