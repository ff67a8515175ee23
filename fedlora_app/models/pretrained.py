"""What of a model comes from its files: found, read without running code, and accounted for.

Whatever the files lack is either new and trained (a head, a pooler that the head reads) or
an error: a weight that is random in each process and saved nowhere makes results that
nobody can load again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedlora_app.data import packaged
from fedlora_app.models.bits import quantised_problem, quantization_config
from fedlora_app.models.onnx_weights import read_bert

ENCODERS = ("tokenizer_config.json", "tokenizer.json", "preprocessor_config.json")
POINTER = b"version https://git-lfs"  # what Git LFS leaves where it did not fetch a file
OWN_CODE = (
    "it needs code of its own (auto_map), and code in a model's folder is never run here; name "
    "a model of a kind that transformers knows"
)


@dataclass(frozen=True)
class Loaded:
    """A model, and where its weights come from.

    Parameters
    ----------
    model : nn.Module
        With its stock head, or none.
    loaded : int
        Tensors that came from the files.
    fresh : tuple of str
        Parameters that did not; they hold nothing useful yet.
    parts : tuple of str
        The modules that consist of them, to be trained and saved.
    unused : int
        Tensors of the files that the model has no place for, such as another head.
    """

    model: Any
    loaded: int
    fresh: tuple[str, ...]
    parts: tuple[str, ...]
    unused: int

    def line(self) -> str:
        """Return what was loaded and what was made new, for the log."""
        new = f"{len(self.fresh)} made new ({', '.join(self.parts)})" if self.fresh else "none new"
        unused = f", {self.unused} of the files not used" if self.unused else ""
        return f"{self.loaded} tensors loaded, {new}{unused}"


def locate(name: str) -> tuple[str, bool]:
    """Return the folder, packaged ONNX file or hub id to load, and whether it is local."""
    if name.startswith(packaged.PREFIX):
        return str(packaged.model_path(name)), True
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path), True
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise FileNotFoundError(
            f"model.name: expected a folder with a model, but {path.absolute()} is none; "
            "correct the path or name a Hugging Face model id"
        )
    return name, False


def encoder_state(name: str) -> list[object] | None:
    """Return what tells the files of a tokenizer or image processor from those of another state.

    A hub's model is told by its commit. None: they are not here yet.
    """
    source, local = locate(name)
    if not local:
        from huggingface_hub import try_to_load_from_cache

        found = (try_to_load_from_cache(source, file) for file in ENCODERS)
        place = next((str(path) for path in found if isinstance(path, str)), None)
        return [place] if place else None
    folder = Path(source)
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    about = [(file.name, file.stat()) for file in files if file.is_file()]
    return [source, *([name, s.st_size, s.st_mtime_ns] for name, s in about)]


def load_pretrained(
    name: str,
    num_labels: int,
    *,
    auto: str,
    dtype: Any,
    shapes_only: bool = False,
    quantization: str = "none",
) -> Loaded:
    """Return the model of this name, with its stock head or without one.

    Parameters
    ----------
    name : str
        A packaged model, a local folder or a Hugging Face id.
    num_labels : int
        Width of the head.
    auto : str
        The class of transformers that loads it: ``AutoModel`` without a head, or
        ``AutoModelForSequenceClassification`` and the like.
    dtype : torch.dtype
    shapes_only : bool (default: False)
        Read no weights, only what there are; the model lies on torch's device "meta".
    quantization : {"none", "4bit", "8bit"}
        Bits of the weights of linear layers (default: "none", as they are).

    Raises
    ------
    FileNotFoundError
        If there is no such model, or its files cannot be read.
    ValueError
        If it is of a kind that cannot be used, or lacks weights that training does not make.
    """
    import transformers

    source, local = locate(name)
    settings = None if source.endswith(".onnx") else read_settings(name)
    if problem := quantised_problem(settings, quantization):
        raise ValueError(f"model.name = {name!r}: {problem}")
    few_bits = quantization_config(quantization, dtype)
    held_so = getattr(settings, "quantization_config", None) is not None
    if held_so and shapes_only:  # packed tensors have shapes of their own
        del settings.quantization_config  # type: ignore[union-attr]
        with torch.device("meta"):
            whole = getattr(transformers, auto).from_config(settings, dtype=dtype)
        return Loaded(whole, len(dict(whole.named_parameters())), (), (), 0)
    with loading(name, local):
        kind: Any
        if settings is None:
            settings, weights = read_bert(Path(source))
            # The Auto classes insist on a path.
            kinds = {
                "AutoModel": transformers.BertModel,
                "AutoModelForSequenceClassification": transformers.BertForSequenceClassification,
            }
            if auto not in kinds:
                raise ValueError("it is a model for texts")
            kind = kinds[auto]
            path, options = None, {"config": settings, "state_dict": weights}
        else:
            kind = getattr(transformers, auto)
            path, options = source, {"config": settings}
            options |= {"device_map": "meta"} if shapes_only else {}
            if few_bits is not None and not held_so and not shapes_only:
                options |= {"quantization_config": few_bits}
        settings.num_labels = num_labels
        model, info = kind.from_pretrained(
            path,
            dtype=dtype,
            # No pickled checkpoints: loading one can run code.
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=local,
            ignore_mismatched_sizes=True,  # a head of another width is replaced; see below
            output_loading_info=True,
            **options,
        )
    return _account(name, model, info, head=auto != "AutoModel")


def read_settings(name: str) -> Any:
    """Return the ``transformers`` configuration of a model in a folder or on the hub.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If it is of a kind that cannot be used here.
    """
    import transformers

    source, local = locate(name)
    with loading(name, local):
        settings: Any = transformers.AutoConfig.from_pretrained(
            source, trust_remote_code=False, local_files_only=local
        )
    if getattr(settings, "is_encoder_decoder", False):
        raise ValueError(
            f"model.name = {name!r}: encoder-decoder models ({settings.model_type}) are not "
            "supported; name an encoder such as BERT, or a decoder such as Llama"
        )
    return settings


def _account(name: str, model: Any, info: dict[str, Any], *, head: bool) -> Loaded:
    """Say where each tensor came from, and refuse what is neither loaded nor a new part."""
    sizes = {key[0]: key[1:] for key in info["mismatched_keys"]}
    fresh = sorted({*info["missing_keys"], *sizes} & dict(model.named_parameters()).keys())
    base = f"{model.base_model_prefix}." if head else ""
    part_of = {parameter: _part(model, parameter, set(fresh)) for parameter in fresh}
    # A pooler is read by the head alone, and learns with it; nothing else inside may be random.
    inside = [
        parameter
        for parameter, part in part_of.items()
        if not part or (parameter.startswith(base) and part.rpartition(".")[2] != "pooler")
    ]
    total = len(dict(model.named_parameters()))
    unused = sorted(info["unexpected_keys"])
    if inside:
        wrong = [p for p in inside if p in sizes]
        if wrong:
            file, own = (tuple(shape) for shape in sizes[wrong[0]][:2])
            what = f"{wrong[0]} has shape {file} in its files and {own} by its config.json"
        else:
            what = f"its files lack {len(inside)} of {total} tensors, the first {inside[0]}"
        other = (
            f"; {len(unused)} tensors in them are not the model's, the first {unused[0]}"
            if unused
            else ""
        )
        raise ValueError(
            f"model.name = {name!r}: {what}{other}; save the model with save_pretrained of its "
            "transformers class, whose names of tensors have no other prefix"
        )
    return Loaded(
        model, total - len(fresh), tuple(fresh), tuple(sorted({*part_of.values()})), len(unused)
    )


def _part(model: nn.Module, parameter: str, fresh: set[str]) -> str:
    """Return the largest module around a new parameter that has no other parameters."""
    part, best = parameter.rpartition(".")[0], ""
    while part:
        names = {f"{part}.{n}" for n, _ in model.get_submodule(part).named_parameters()}
        if not names <= fresh:
            break
        best, part = part, part.rpartition(".")[0]
    return best


@contextmanager
def loading(name: str, local: bool) -> Iterator[None]:
    """Load without progress bars, and say what to do when that fails."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # "Some weights are newly initialized" is the purpose here, not a warning.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        if "trust_remote_code" in str(error):
            raise ValueError(f"model.name = {name!r}: {OWN_CODE}") from error
        if isinstance(error, ImportError):
            raise ValueError(
                f"model.name = {name!r}: it needs a package that is not installed: {reason}"
            ) from error
        if local:
            folder = locate(name)[0]
            if broken := broken_file(Path(folder)):
                raise FileNotFoundError(f"model.name = {name!r}: {broken}") from error
            if isinstance(error, ValueError) and "Unrecognized configuration class" in reason:
                raise ValueError(
                    f"model.name = {name!r}: transformers has no classifier for models of this "
                    "kind; name another model, or for texts set model.head = 'mean-pool'"
                ) from error
            wanted = (
                f"the files that `{packaged.install(name)}` installs"
                if name.startswith(packaged.PREFIX)
                else "a folder with config.json, tokenizer files and *.safetensors"
            )
            raise FileNotFoundError(
                f"model.name = {name!r}: expected {wanted}, but loading failed: "
                f"{reason.rstrip(' :.')}; add what is missing, or name another model"
            ) from error
        if not isinstance(error, OSError):  # reached, but of a kind that transformers refuses
            raise ValueError(f"model.name = {name!r}: {reason}") from error
        raise FileNotFoundError(
            f"model.name = {name!r} is no local folder, and the Hugging Face Hub did not provide "
            f"it: {reason} Name a local folder, use 'packaged:minilm-l6', or run `hf download "
            f"{name}` where there is a network and set HF_HOME to that cache and HF_HUB_OFFLINE=1"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()


def broken_file(folder: Path) -> str:
    """Return which file of a model is a stand-in for another, or cut, and what to do; or ""."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not file.is_file():
            continue
        with file.open("rb") as opened:
            start = opened.read(len(POINTER))
        if start == POINTER:
            return (
                f"{file} is a Git LFS pointer and not the file itself; run `git lfs pull` in its "
                "folder, or download the file"
            )
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt"):
                    pass
            except (SafetensorError, OSError) as error:
                size = file.stat().st_size
                return f"{file} ({size:,} bytes) is damaged or cut ({error}); download it again"
    return ""
