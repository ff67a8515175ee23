"""Which model is fine-tuned: tokenizer and classifier.

Everything new in a model is drawn from a ``torch.Generator`` of its
own, so a seed gives the same bits in every process, whatever ran there before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedlora_app.config.keys import ModelConfig
from fedlora_app.data import packaged
from fedlora_app.models.pretrained import Loaded, load_pretrained, loading, locate

# Where classifiers keep what must be trained in full.
HEADS = ("classifier", "score", "pre_classifier")
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
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> ClassifierOutput:
        """Return the logits, and the mean cross-entropy if ``labels`` (batch,) are given."""
        # Not every encoder takes the types of pairs.
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        found = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **types)
        states = found.last_hidden_state
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

    source, local = locate(packaged.tokenizer_name(config.name))
    with loading(config.name, local):
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=False, local_files_only=local
        )
    words = len(tokenizer.get_vocab()) - len(set(tokenizer.all_special_ids))
    if words < 1:  # transformers makes up an empty one where it finds no files
        raise ValueError(
            f"model.name = {config.name!r}: its tokenizer knows no words, so the tokenizer's files "
            "are missing; put those that the model was trained with beside config.json "
            "(tokenizer.json, or vocab.txt and the like)"
        )
    if tokenizer.pad_token_id is None:  # decoders
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer of {config.name!r} has neither a padding nor an end token; "
                "give it a pad_token and save it in a local folder"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def saved_tokenizer(folder: Path) -> Any:
    """Return the tokenizer that a run kept beside its adapter; None where it did not."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").exists():
        return None
    with loading(str(folder), True):
        return AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )


def build_model(
    config: ModelConfig,
    *,
    num_labels: int,
    seed: int,
    precision: str = "float32",
    shapes_only: bool = False,
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
    shapes_only : bool
        Read no weights: a model on torch's device "meta", to check others against
        (default: False).

    Returns
    -------
    nn.Module
        In evaluation mode; its output has ``.logits`` (batch, num_labels) and ``.loss``.
        Its attribute ``loaded`` says which weights are pretrained and which new.

    Raises
    ------
    FileNotFoundError
        If the model cannot be found.
    ValueError
        If ``num_labels``, ``precision`` or the name of a packaged model is wrong, or the model
        is of a kind that cannot be used, or lacks weights.
    """
    if not pools(config):
        model = build_classifier(
            config, num_labels=num_labels, seed=seed, precision=precision, shapes_only=shapes_only
        )
    else:
        with untouched_rng():
            found = load_pretrained(
                config.name,
                _labels(num_labels),
                auto="AutoModel",
                dtype=_dtype(precision),
                shapes_only=shapes_only,
            )
            model = _finished(*_mean_pool(found, num_labels), seed)
    if hasattr(model, "score"):
        # Decoders classify at the last token that is not padding: agree on what padding is.
        settings: Any = model.config
        settings.pad_token_id = build_tokenizer(config).pad_token_id
    return model


def build_classifier(
    config: ModelConfig,
    *,
    num_labels: int,
    seed: int,
    precision: str = "float32",
    shapes_only: bool = False,
    auto: str = "AutoModelForSequenceClassification",
) -> nn.Module:
    """Return a model with the head that transformers gives it; arguments as of ``build_model``.

    Parameters
    ----------
    auto : str
        The class of transformers that loads it.
    """
    with untouched_rng():
        found = load_pretrained(
            config.name,
            _labels(num_labels),
            auto=auto,
            dtype=_dtype(precision),
            shapes_only=shapes_only,
        )
        found.model.config.problem_type = "single_label_classification"  # whatever it was
        return _finished(found.model, found, seed)


def _labels(num_labels: int) -> int:
    if num_labels < 2:
        raise ValueError(f"num_labels: expected at least 2, got {num_labels}")
    return num_labels


def _dtype(precision: str) -> torch.dtype:
    if precision not in DTYPES:
        raise ValueError(f"precision: expected one of {', '.join(DTYPES)}; got {precision!r}")
    return DTYPES[precision]


def _finished(model: nn.Module, found: Loaded, seed: int) -> nn.Module:
    """Draw what is new from the seed, keep what is trained in float32, and say what was loaded."""
    if not _head_names(model):
        raise ValueError(
            f"{type(model).__name__} has no classification head under any of the names "
            f"{', '.join(HEADS)}; set model.head = 'mean-pool' or name another model"
        )
    model.loaded = found  # type: ignore[assignment]
    for name in trained_parts(model):
        model.get_submodule(name).float()
    _initialise(model, found.fresh, seed)
    return model.eval()


def positions(model: nn.Module) -> int | None:
    """Return how many tokens a model with a table of positions takes; None without a table."""
    settings: Any = model.config
    most = getattr(settings, "max_position_embeddings", None)
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("position" in last or last == "wpe"):
            rows = module.num_embeddings if most is None else min(module.num_embeddings, most)
            # RoBERTa counts from after the padding.
            return rows if module.padding_idx is None else rows - module.padding_idx - 1
    return None


def pools(config: ModelConfig) -> bool:
    """Tell whether texts are classified by the mean of an encoder's states."""
    return _head(config, locate(config.name)[0]) == "mean-pool"


def _head(config: ModelConfig, source: str) -> str:
    if config.head != "auto":
        return config.head
    folder = Path(source)
    pooled = (folder / "modules.json").exists() or (folder / "1_Pooling").exists()
    named = config.name.startswith("sentence-transformers/") or "minilm" in config.name.lower()
    return "mean-pool" if pooled or named else "stock"


def _mean_pool(found: Loaded, num_labels: int) -> tuple[MeanPoolClassifier, Loaded]:
    """Put the head on an encoder; a pooler, whether new or not, is not used by it."""
    model = MeanPoolClassifier(found.model, num_labels)
    fresh = ("classifier.bias", "classifier.weight", *(f"encoder.{n}" for n in found.fresh))
    return model, replace(found, model=model, fresh=fresh, parts=("classifier",))


def trained_parts(model: nn.Module) -> list[str]:
    """Return the modules that are trained in full: the head, and whatever else is new."""
    found: Loaded | None = getattr(model, "loaded", None)
    heads = _head_names(model)
    new = [part for part in (found.parts if found else ()) if part.split(".")[0] not in heads]
    return [*heads, *new]


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


@contextmanager
def untouched_rng() -> Iterator[None]:
    """Leave torch's global generator as it is: transformers and PEFT take no other.

    What they draw is overwritten, and the caller's stream must not depend on how much it was.
    """
    with torch.random.fork_rng(devices=[]):
        yield
