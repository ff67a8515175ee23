"""Images: found wherever they lie, refused by name, and trained on by every kind of model."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from fedlora_app.config.keys import RunConfig
from fedlora_app.data import images
from fedlora_app.discretion import DataError
from fedlora_app.launch.inspection import inspect
from fedlora_app.models import small_vit
from fedlora_app.models.lora import add_lora
from fedlora_app.tasks import make_task
from fedlora_app.training import train

SIDE = 8


def picture(seed: int = 0, mode: str = "L", side: int = SIDE) -> Image.Image:
    shape = (side, side) if mode == "L" else (side, side, 3)
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "png")
    return file.getvalue()


def classes(path: Path, names: str = "ab", each: int = 4) -> Path:
    for number, name in enumerate(names):
        (path / name).mkdir(parents=True)
        for i in range(each):
            picture(10 * number + i).save(path / name / f"{i}.png")
    return path


def task_of(path: object = "", model: object = "unused", **keys: object):
    flat = {"task": "image-classification", "data.name": str(path), "model.name": str(model)}
    return make_task(RunConfig.from_flat({**flat, **keys}))


def pixels(rows) -> list[np.ndarray]:
    return [np.asarray(item.open()) for item in rows.items]


def pixel_rows(n: int = 12) -> tuple[np.ndarray, np.ndarray]:
    values = np.random.default_rng(3).integers(0, 256, (n, SIDE * SIDE))
    values[:, [0, -1]] = np.random.default_rng(4).permutation(n)[:, None] * 20  # like no labels
    return values, np.arange(n) % 2


# ----- where they lie --------------------------------------------------------------------


def test_a_folder_for_each_class(tmp_path):
    rows = task_of(classes(tmp_path / "d")).own_rows(str(tmp_path / "d"), None)
    assert rows.about["labels"] == ["a", "b"]
    assert rows.targets.tolist() == [0] * 4 + [1] * 4
    assert (pixels(rows)[5] == np.asarray(picture(11))).all()


def test_folders_of_splits(tmp_path):
    classes(tmp_path / "train")
    classes(tmp_path / "test", each=2)
    task = task_of(tmp_path)
    assert (len(task.train_rows()), len(task.test_rows())) == (8, 4)


def test_without_a_test_split_a_part_is_held_out(tmp_path):
    task = task_of(classes(tmp_path / "d", each=10))
    train_rows, test_rows = task.train_rows(), task.test_rows()
    assert (len(train_rows), len(test_rows)) == (18, 2)
    assert not {p.source for p in train_rows.items} & {p.source for p in test_rows.items}


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_paths_begin_where_the_file_lies(tmp_path, ending, monkeypatch):
    classes(tmp_path / "d")
    paths = [f"{c}/{i}.png" for c in "ab" for i in range(4)]
    if ending == "csv":
        text = "image,label\n" + "".join(f"{p},{p[0]}\n" for p in paths)
    else:
        text = "".join(f'{{"image": "{p}", "label": "{p[0]}"}}\n' for p in paths)
    (tmp_path / "d" / f"list.{ending}").write_text(text)
    monkeypatch.chdir("/")
    rows = task_of().own_rows(str(tmp_path / "d" / f"list.{ending}"), None)
    assert (pixels(rows)[5] == np.asarray(picture(11))).all()


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_column_of_images(tmp_path, kind):
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(i), "path": None} for i in range(4)], "label": [0, 1, 0, 1]},
        features=features,
    )
    path = tmp_path / ("d.parquet" if kind == "parquet" else "d")
    data.to_parquet(path) if kind == "parquet" else data.save_to_disk(path)
    rows = task_of().own_rows(str(path), None)
    assert rows.about["labels"] == ["cat", "dog"]
    assert (pixels(rows)[1] == np.asarray(picture(1))).all()


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files(tmp_path, ending):
    values, labels = pixel_rows()
    parts = {"images-idx3": values.reshape(-1, SIDE, SIDE), "labels-idx1": labels}
    for split, n in (("train", 8), ("t10k", 4)):
        for name, array in parts.items():
            head = bytes([0, 0, 8, array.ndim])
            shape = np.array([n, *array.shape[1:]], ">u4").tobytes()
            data = head + shape + array[:n].astype(np.uint8).tobytes()
            file = tmp_path / f"{split}-{name}-ubyte{ending}"
            file.write_bytes(gzip.compress(data) if ending else data)
    task = task_of(tmp_path)
    assert (len(task.train_rows()), len(task.test_rows())) == (8, 4)
    assert (pixels(task.train_rows())[3].ravel() == values[3]).all()
    file.write_bytes(file.read_bytes()[:10] if not ending else gzip.compress(data[:10]))
    with pytest.raises(DataError, match="expected an idx file of bytes"):
        task.test_rows()


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("ending", [".csv", ".csv.gz"])
def test_a_csv_of_pixels(tmp_path, header, first, ending):
    values, labels = pixel_rows()
    names = [f"p{i}" for i in range(SIDE * SIDE)]
    table = np.c_[labels, values] if first else np.c_[values, labels]
    lines = [",".join(["label", *names] if first else [*names, "label"])] if header else []
    text = "\n".join([*lines, *(",".join(map(str, row)) for row in table)])
    file = tmp_path / f"d{ending}"
    file.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    rows = task_of().own_rows(str(file), None)
    assert rows.targets.tolist() == labels.tolist()
    assert (pixels(rows)[3].ravel() == values[3]).all()


def test_pixels_whose_label_could_be_either_column_are_refused(tmp_path):
    values, labels = pixel_rows()
    values[:, 0] = labels
    rows = np.c_[values, labels]
    (tmp_path / "d.csv").write_text("\n".join(",".join(map(str, row)) for row in rows))
    with pytest.raises(DataError, match="both may be; write a header"):
        task_of().own_rows(str(tmp_path / "d.csv"), None)


def test_parts_of_the_packaged_images_share_none():
    name = "packaged:mnist-5k"
    parts = [*images.packaged_splits(name).values(),
             *images.packaged_splits(name, "pretraining").values()]  # fmt: skip
    numbers = [set(part.parts[0].numbers) for part in parts]
    assert [len(n) for n in numbers] == [3000, 1000, 1000]
    assert len(set.union(*numbers)) == 5000


# ----- how they are kept -----------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
@pytest.mark.parametrize("wanted", ["L", "RGB"])
def test_every_mode_becomes_grey_or_coloured(tmp_path, mode, wanted):
    from fedlora_app.tasks.image_classification import _in_mode

    grey = np.full((SIDE, SIDE), 255 if mode == "1" else 128, np.uint8)
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        image = Image.fromarray((grey / 255 * (1 if mode == "F" else 65535)).astype(kind))
    else:
        image = Image.fromarray(grey).convert(mode)
    found = np.asarray(_in_mode(image, wanted))
    assert found.shape == ((SIDE, SIDE) if wanted == "L" else (SIDE, SIDE, 3))
    assert abs(found.astype(int) - int(grey[0, 0])).max() <= 1


def test_what_is_transparent_is_white():
    from fedlora_app.tasks.image_classification import _in_mode

    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert np.asarray(_in_mode(clear, "RGB")).min() == 255


def test_a_photo_is_turned_as_its_camera_was_held(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned to the right
    Image.new("RGB", (6, 3)).save(tmp_path / "p.jpg", exif=exif)
    assert images.picture(str(tmp_path / "p.jpg"), "here").open().size == (3, 6)


# ----- what is refused -------------------------------------------------------------------


def bomb() -> bytes:
    head = bytearray(png())
    head[16:24] = np.array([30_000, 30_000], ">u4").tobytes()
    import zlib

    head[29:33] = np.array([zlib.crc32(bytes(head[12:29]))], ">u4").tobytes()
    return bytes(head)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"no image", "expected an image that can be read"),
        (b"", "expected an image that can be read"),
        (png()[:-30], "expected an image that can be read"),
        (bomb(), "expected at most 89,478,485 pixels"),
    ],
    ids=["broken", "empty", "cut", "huge"],
)
def test_an_unreadable_image_is_named_at_the_door(tmp_path, data, said):
    classes(tmp_path / "d", each=10)
    for name in ("a", "b"):  # whatever is held out
        for i in (7, 8, 9):
            (tmp_path / "d" / name / f"{i}.png").write_bytes(data)
    with pytest.raises(DataError, match=said) as error:
        inspect(task_of(tmp_path / "d"))
    assert str(tmp_path / "d" / "a" / "7.png") in str(error.value)


def test_of_very_many_images_some_are_read_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("fedlora_app.tasks.image_classification.READ_WHOLE", 3)
    task = task_of(classes(tmp_path / "d"))
    rows = task.own_rows(str(tmp_path / "d"), None)
    assert "one image in 3 as a whole" in task.show(rows)[-1]
    whole = (tmp_path / "d" / "a" / "1.png").read_bytes()
    (tmp_path / "d" / "a" / "1.png").write_bytes(whole[:-30])  # says what it is, and is cut off
    task.look_at(rows)
    (tmp_path / "d" / "a" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png"):
        task.look_at(rows)
    (tmp_path / "d" / "a" / "1.png").write_bytes(whole)
    (tmp_path / "d" / "a" / "0.png").write_bytes(whole[:-30])
    with pytest.raises(DataError, match=r"0\.png"):
        task.look_at(rows)


def test_an_unreadable_image_within_a_table_is_named_by_its_row(tmp_path):
    data = {"image": [png(), png(), b"none", png()], "label": ["a", "b", "a", "b"]}
    parquet.write_table(pyarrow.table(data), tmp_path / "d.parquet")
    task = task_of()
    with pytest.raises(DataError, match=r"d\.parquet, row 3: expected an image that can be read"):
        task.look_at(task.own_rows(str(tmp_path / "d.parquet"), None))


def test_a_missing_image_is_named(tmp_path):
    (tmp_path / "d.csv").write_text("image,label\n" + "none.png,a\nnone.png,b\n" * 10)
    with pytest.raises(FileNotFoundError, match=r"none\.png.*not there"):
        inspect(task_of(tmp_path / "d.csv"))


def test_a_class_without_images_and_one_class_alone(tmp_path):
    (classes(tmp_path / "d") / "c").mkdir()
    with pytest.raises(DataError, match=r"d/c.*expected images.*none; add some"):
        task_of(tmp_path / "d").train_rows()
    with pytest.raises(DataError, match=r"expected at least two labels.*add rows of another"):
        task_of(classes(tmp_path / "e", "a", each=20)).train_rows()


def test_a_packaged_name_of_another_kind_names_the_task():
    with pytest.raises(ValueError, match=r"which are texts; set a task for texts"):
        task_of("packaged:reuters-r8").train_rows()
    with pytest.raises(ValueError, match=r"which are images; set task=image-classification"):
        make_task(RunConfig.from_flat({"data.name": "packaged:mnist-5k"})).train_rows()


def test_texts_are_no_images_and_images_no_texts(tmp_path):
    text = "text,label\n" + "so it goes,a\nand on,b\n" * 10
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(ValueError, match=r"data\.image-column"):
        task_of(tmp_path / "d.csv").train_rows()
    with pytest.raises(ValueError, match="expected an image"):
        inspect(task_of(tmp_path / "d.csv", **{"data.image-column": "text"}))
    classes(tmp_path / "e")
    with pytest.raises((ValueError, FileNotFoundError), match="expected"):
        make_task(RunConfig.from_flat({"data.name": str(tmp_path / "e")})).train_rows()


# ----- models ----------------------------------------------------------------------------

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 16, "image_size": SIDE, "patch_size": 4}  # fmt: skip
KINDS = {
    "ViT": SMALL,
    "DeiT": SMALL,
    "Swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2,
             "image_size": 16, "patch_size": 2},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
               "layer_type": "basic"},
    "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 224},
}  # fmt: skip


def save_model(path: Path, kind: str, processor: bool = True, side: int = 0, **keys) -> Path:
    import transformers

    sizes = {**KINDS[kind], **keys}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForImageClassification")(config).save_pretrained(str(path))
    if processor:
        side = side or (32 if kind in ("ResNet", "ConvNext") else sizes["image_size"])
        transformers.ViTImageProcessorPil(
            size={"height": side, "width": side}
        ).save_pretrained(str(path))  # fmt: skip
    return path


@pytest.mark.parametrize("kind", list(KINDS))
def test_any_classifier_of_images_trains_and_loads_in_peft(tmp_path, kind):
    from peft import PeftModel

    save_model(tmp_path / "m", kind)
    task = task_of(classes(tmp_path / "d"), tmp_path / "m")
    rows = task.own_rows(str(tmp_path / "d"), None)
    base = task.model(rows.about, seed=1)
    assert task.problems(base, rows) == []
    inputs = task.encode(rows)
    model = add_lora(base, task.config.lora, rank=2, seed=1)
    assert any(".lora_B." in name for name, _ in model.named_parameters())
    before = {n: b.clone() for n, b in model.named_buffers()}
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    settings = RunConfig.from_flat({"train.steps": 1, "train.precision": "float32"}).train
    assert np.isfinite(train(model, inputs, settings, seed=1).loss)
    assert any((p != start[n]).any() for n, p in model.named_parameters() if n in start)
    assert all((b == before[n]).all() for n, b in model.named_buffers()), "batch statistics moved"
    model.save_pretrained(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(task.model(rows.about, seed=9), str(tmp_path / "adapter"))
    batch = {"pixel_values": inputs.batch(range(4))["pixel_values"]}
    with torch.no_grad():
        assert torch.allclose(model.eval()(**batch).logits, again.eval()(**batch).logits, atol=1e-6)


def test_a_model_and_its_processor_have_to_go_together(tmp_path):
    rows = task_of(classes(tmp_path / "d")).own_rows(str(tmp_path / "d"), None)

    def problems(path: Path) -> list[str]:
        task = task_of(tmp_path / "d", path)
        return task.problems(task.model(rows.about, seed=1), rows)

    assert "makes 12 × 12 pixels, and the model takes 8 × 8" in problems(
        save_model(tmp_path / "size", "ViT", side=12)
    )[0]  # fmt: skip
    assert "expected 1 or 3 channels, its config says 4" in problems(
        save_model(tmp_path / "four", "ViT", num_channels=4)
    )[0]  # fmt: skip
    with pytest.raises(ValueError, match="expected its image processor"):
        problems(save_model(tmp_path / "none", "ViT", processor=False))


def test_the_packaged_model_is_the_same_each_time(tmp_path):
    for name in ("one", "two"):
        torch.manual_seed(len(name))
        small_vit.make(tmp_path / name, steps=2)
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert first == second
