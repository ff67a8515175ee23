"""A run's model as a folder for other libraries, with a card; on the Hub if asked for."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_app.after.card import card
from fedlora_app.after.run import LoadedRun, load_run
from fedlora_app.config.keys import Scalar
from fedlora_app.report.folder import save_adapter, write_about
from fedlora_app.report.records import read_json, write_json

if TYPE_CHECKING:
    from strategies.lora import Adapter

TYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Export:
    """What was exported.

    Parameters
    ----------
    folder : Path
    merged : bool
    dtype : str
        Of merged weights; "" of an adapter.
    rank : int
        The largest of a module.
    energy : float or None
        Share of the adapter's energy that a cut has kept; None: nothing was cut.
    base : str
        What the base is called there.
    url : str
        Where it was pushed to; "": nowhere.
    """

    folder: Path
    merged: bool
    dtype: str
    rank: int
    energy: float | None
    base: str
    url: str = ""


def export_run(
    run: str | Path,
    to: str | Path,
    *,
    merge: bool = False,
    rank: int | None = None,
    dequantise: bool = False,
    dtype: str = "float32",
    push: str | None = None,
    public: bool = False,
    base: str | None = None,
    base_name: str | None = None,
    config: Mapping[str, Scalar] | None = None,
) -> Export:
    """Write a run's model as other libraries read it, with tokenizer, label names and a card.

    Parameters
    ----------
    run : str or Path
        The run's folder.
    to : str or Path
        A folder that is not there yet; whole at the end, or not there.
    merge : bool (default: False)
        A plain model instead of an adapter for PEFT.
    rank : int, optional
        Cut the adapter to this rank first, by singular values.
    dequantise : bool (default: False)
        With ``merge``: of a base of few bits, write the weights that these stand for.
    dtype : {"float32", "bfloat16", "float16"}
        Of merged weights (default: "float32", which rounds nothing).
    push : str, optional
        Repository on the Hugging Face Hub to push to, as in ``owner/name``; its token and address
        are huggingface_hub's own.
    public : bool (default: False)
        Whether a repository that is made for it is open to everybody.
    base, config
        As of ``load_run``.
    base_name : str, optional
        What others know the base by, written into the adapter and the card (default: as the run
        names it).

    Raises
    ------
    FileExistsError
        If ``to`` is there.
    FileNotFoundError or ValueError
        As of ``load_run``; if a base of few bits is to be merged without ``dequantise``, or what is
        pushed would name a base that only this machine has.
    """
    target = Path(to).expanduser().absolute()
    if target.exists():
        raise FileExistsError(f"{target}: expected a folder that is not there yet; name another")
    known = read_json(Path(run).expanduser() / "config.json")
    quantised = known.get("model.quantization", "none") != "none"
    if problems := _impossible(merge, quantised, dequantise, dtype, rank):
        raise ValueError("; ".join(problems))
    # Merged into float32: bfloat16 would round the adapter away.
    exact: dict[str, Scalar] = {"train.precision": "float32"} if merge else {}
    loaded = load_run(run, base=base, config={**(config or {}), **exact})
    name = base_name or _name_of(loaded)
    if push and not merge and not _public(name):
        raise ValueError(
            f"push: expected a base that others can load, got {name!r}; name it as the Hub does "
            "with base_name, or merge"
        )
    found, energy = _adapter(loaded, rank)
    new = target.with_name(target.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    export = Export(target, merge, dtype if merge else "", found.rank, energy, name)
    try:
        _write(loaded, found, new, export, dequantise=quantised)
        (new / "README.md").write_text(card(loaded, export), encoding="utf-8")
        told = {key: value for key, value in vars(export).items() if key not in ("folder", "url")}
        write_json(new / "export.json", {"run": loaded.folder.name, **told})
        new.rename(target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if push is None:
        return export
    return Export(**{**vars(export), "url": push_folder(target, push, public=public)})


def push_folder(folder: Path, repository: str, *, public: bool = False) -> str:
    """Put a folder into a repository on the Hugging Face Hub, which is made if needed.

    Returns
    -------
    str
        Where it is.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    made = api.create_repo(repository, private=not public, exist_ok=True)
    api.upload_folder(
        repo_id=made.repo_id, folder_path=folder, commit_message="Add what FedLoRA trained"
    )
    return str(made)


def _impossible(
    merge: bool, quantised: bool, dequantise: bool, dtype: str, rank: int | None
) -> list[str]:
    problems = []
    if dtype not in TYPES:
        problems.append(f"dtype: expected one of {', '.join(TYPES)}; got {dtype!r}")
    elif dtype != "float32" and not merge:
        problems.append("dtype: is of merged weights, and an adapter is float32; set merge as well")
    if rank is not None and rank < 1:
        problems.append(f"rank: expected at least 1, got {rank}")
    if merge and quantised and not dequantise:
        problems.append(
            "merge: the run's base has few bits, into which nothing can be merged without rounding "
            "it away; set dequantise to write the numbers that the bits stand for, or export the "
            "adapter"
        )
    if dequantise and not (merge and quantised):
        problems.append("dequantise: is for merging into a base of few bits, which this is not")
    return problems


def _name_of(loaded: LoadedRun) -> str:
    """Return the base's id, or where it lies on this machine."""
    from fedlora_app.models.pretrained import locate

    source, local = locate(loaded.config.model.name)
    return str(Path(source).absolute()) if local else source


def _public(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _adapter(loaded: LoadedRun, rank: int | None) -> tuple[Adapter, float | None]:
    """Return the run's adapter, cut if that is asked for, and put into its model."""
    from strategies.client import adapter_state, load_adapter
    from strategies.lora import Adapter
    from strategies.lora.cutting import cut

    state = {k: tensor.cpu().clone() for k, tensor in adapter_state(loaded.model).items()}
    whole = Adapter.from_state_dict(state, config=loaded.model.peft_config["default"])
    if rank is None or rank >= whole.rank:
        return whole, None
    found, energy = cut(whole, rank)
    load_adapter(loaded.model, found)
    return found, energy


def _write(
    loaded: LoadedRun, adapter: Adapter, folder: Path, export: Export, *, dequantise: bool
) -> None:
    from fedlora_app.models import exporting

    task, config, model = loaded.task, loaded.config, loaded.model
    pooled, most = exporting.is_pooled(model), config.data.max_length
    if dequantise and export.merged:
        model = _dequantised(loaded, adapter)
    task.describe(model.get_base_model(), loaded.about)
    if export.merged:
        exporting.save_merged(model, folder, dtype=export.dtype, max_length=most)
    elif pooled:
        exporting.save_encoder_adapter(model, adapter, folder, base=export.base, max_length=most)
    else:
        save_adapter(model, folder, export.base, {}, task.peft_type)
    task.save_encoder(folder)
    write_about(folder, loaded.about)


def _dequantised(loaded: LoadedRun, adapter: Adapter) -> Any:
    """Return the run's model on a base with the numbers that its few bits stand for."""
    from fedlora_app.models.exporting import dequantised
    from fedlora_app.models.lora import add_lora
    from strategies.client import load_adapter

    config = loaded.config
    base = loaded.task.model(loaded.about, seed=config.seed, precision=config.train.precision)
    model = add_lora(dequantised(base), config.lora, rank=1, seed=config.seed)
    load_adapter(model, adapter)
    return model.eval()
