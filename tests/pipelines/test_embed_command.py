"""`python -m pipelines.embed`: each image's features and path, whatever kills it meanwhile; nothing overwritten."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_pretrained import write_checkpoint
from tiny import digits

import dino
from dino.decode import content_id
from pipelines import embed
from pipelines.embed import embed_folder
from pipelines.evaluation.embedded import GROUP_ROWS, read_embedded, rows_table, write_embedded

PROJECT = Path(__file__).parents[2]
CPU = torch.device("cpu")
EXIT_REQUEUE = 75
KEY = "0123456789abcdef"


def fill(folder: Path, count: int) -> Path:
    """Images in folders of different depths, of several kinds, and among them what is none."""
    for number, data in enumerate(digits(count, 16, 20)):
        file = folder / ("" if number % 3 else f"d{number % 5}/deeper") / f"{number:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    turned = io.BytesIO()
    Image.new("CMYK", (30, 20), (9, 90, 200, 10)).save(turned, "JPEG")
    (folder / "cmyk.JPG").write_bytes(turned.getvalue())
    (folder / "no-suffix").write_bytes(digits(1)[0])
    (folder / "ünï cödé.png").write_bytes(digits(2)[1])
    (folder / "broken.png").write_bytes(digits(1)[0][:90])
    (folder / "link-to-nothing.png").symlink_to("nowhere")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "teacher.safetensors")


def command(folder: Path, out: Path, checkpoint: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DINO_")}
    arguments = [str(folder), "--out", str(out), "--checkpoint", str(checkpoint)]
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.embed", *arguments],
        cwd=out.parent,
        env=environment | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "DINO_DEVICE": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def after_parts(process: subprocess.Popen[str], out: Path, count: int) -> None:
    """Wait until so many parts are kept."""
    until = time.monotonic() + 200
    while len(list(Path(f"{out}.parts").glob("[!.]*.parquet"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.002)


def test_each_readable_image_has_its_id_path_and_features(tmp_path: Path, checkpoint: Path, capsys) -> None:
    folder, out = fill(tmp_path / "images", 20), tmp_path / "features.parquet"
    embed_folder(folder, out, checkpoint, device=CPU, batch=7)
    found = read_embedded(out)
    assert found.paths == sorted(found.paths, key=lambda path: path.split("/"))
    assert {"cmyk.JPG", "no-suffix", "ünï cödé.png", "d0/deeper/0000.png"} <= set(found.paths)
    assert len(found.paths) == 23
    assert found.ids == [content_id((folder / path).read_bytes()) for path in found.paths]
    expected = dino.load(checkpoint)([folder / path for path in found.paths])
    assert torch.allclose(found.rows_ND, expected, rtol=0, atol=1e-5)
    table = pq.read_table(out)
    assert table.schema.field("features").type == pa.list_(pa.float32(), 16)
    assert [path for path, _ in found.facts["broken"]] == ["broken.png", "link-to-nothing.png"]
    assert (found.facts["key"], found.facts["resize_px"], found.facts["crop_px"]) == (KEY, 14, 12)
    assert found.facts["folder"] == "images"
    words = capsys.readouterr().out
    assert "23 images" in words and "2 of 25 images can't be read" in words and "no images, left alone: 1" in words
    assert "broken.png: not readable as an image" in words and "link-to-nothing.png: No such file" in words
    assert not Path(f"{out}.parts").exists()


def test_killed_and_run_again_it_leaves_the_bytes_of_a_quiet_run(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = fill(tmp_path / "images", 3 * embed.PART_FILES), tmp_path / "killed.parquet"
    quiet = tmp_path / "quiet.parquet"
    embed_folder(folder, quiet, checkpoint, device=CPU)

    process = command(folder, out, checkpoint)
    after_parts(process, out, 1)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not out.exists()

    capsys.readouterr()
    embed_folder(folder, out, checkpoint, device=CPU)
    assert "going on after" in capsys.readouterr().out
    assert out.read_bytes() == quiet.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "killed.parquet", "quiet.parquet"]


@pytest.mark.acceptance  # `ending` is heeded as by the stages, of which test_ending.py tells
def test_stopped_in_order_it_asks_to_be_run_again_and_goes_on(tmp_path: Path, checkpoint: Path) -> None:
    folder, out = fill(tmp_path / "images", 4 * embed.PART_FILES), tmp_path / "features.parquet"
    process = command(folder, out, checkpoint)
    after_parts(process, out, 1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == EXIT_REQUEUE and not out.exists()
    assert "run the same command again" in errors and "Traceback" not in errors

    process = command(folder, out, checkpoint)
    words, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert "going on after" in words


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "PART_FILES", 8)


def interrupted(folder: Path, out: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Run until all parts are kept and the output would be written; the parts."""

    def full(*arguments: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(embed, "write_embedded", full)
        with pytest.raises(OSError, match="disk full"):
            embed_folder(folder, out, checkpoint, device=CPU, batch=3)
    return sorted(Path(f"{out}.parts").glob("[!.]*.parquet"))


@pytest.mark.usefixtures("small_parts")
def test_files_that_change_between_the_runs_are_embedded_again(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = fill(tmp_path / "images", 30), tmp_path / "a.parquet"
    parts = interrupted(folder, out, checkpoint, monkeypatch)
    (folder / "0001.png").write_bytes(digits(9)[8])
    parts[0].write_bytes(parts[0].read_bytes()[:-50])  # a damaged part is no part
    capsys.readouterr()
    embed_folder(folder, out, checkpoint, device=CPU, batch=3)
    assert "the folder changed since the interrupted run" in capsys.readouterr().out
    embed_folder(folder, tmp_path / "b.parquet", checkpoint, device=CPU, batch=3)
    assert out.read_bytes() == (tmp_path / "b.parquet").read_bytes()


@pytest.mark.usefixtures("small_parts")
def test_interrupted_work_of_another_checkpoint_is_not_thrown_away(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = fill(tmp_path / "images", 10), tmp_path / "a.parquet"
    parts = interrupted(folder, out, checkpoint, monkeypatch)
    other = write_checkpoint(tmp_path / "other.safetensors", mean=[0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match="interrupted work of another checkpoint"):
        embed_folder(folder, out, other, device=CPU)
    assert sorted(Path(f"{out}.parts").glob("[!.]*.parquet")) == parts


def test_what_stands_is_left_alone_or_refused_with_the_cure(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = fill(tmp_path / "images", 6), tmp_path / "features.parquet"
    embed_folder(folder, out, checkpoint, device=CPU)
    before = out.read_bytes()
    embed_folder(folder, out, checkpoint, device=CPU)
    assert "up to date" in capsys.readouterr().out

    other = write_checkpoint(tmp_path / "other.safetensors", key="fedcba9876543210")
    with pytest.raises(ValueError, match=f"another checkpoint .key {KEY}, now fedcba9876543210.*--replace"):
        embed_folder(folder, out, other, device=CPU)
    with pytest.raises(ValueError, match=r"another folder \(images from where it lies\)"):
        embed_folder(folder / "d0", out, checkpoint, device=CPU)
    (folder / "new.png").write_bytes(digits(1)[0])
    (folder / "0001.png").unlink()
    later = time.time() + 5
    os.utime(folder / "0002.png", (later, later))
    with pytest.raises(ValueError, match=r"1 files added, 1 removed, 1 changed.*--replace"):
        embed_folder(folder, out, checkpoint, device=CPU)
    assert out.read_bytes() == before

    embed_folder(folder, out, other, device=CPU, replace=True)
    found = read_embedded(out)
    assert found.facts["key"] == "fedcba9876543210" and "new.png" in found.paths
    pq.write_table(pa.table({"id": ["theirs"]}), out)
    with pytest.raises(ValueError, match=r"no file of `python -m pipelines.embed`"):
        embed_folder(folder, out, checkpoint, device=CPU, replace=True)
    assert pq.read_table(out).column("id").to_pylist() == ["theirs"]


def test_nothing_to_embed_is_an_error_and_leaves_nothing(tmp_path: Path, checkpoint: Path) -> None:
    out = tmp_path / "out" / "features.parquet"
    with pytest.raises(ValueError, match="no folder"):
        embed_folder(tmp_path / "absent", out, checkpoint, device=CPU)
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="no images in"):
        embed_folder(folder, out, checkpoint, device=CPU)
    (folder / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of the 1 images .* can be read; the first, broken.png: not an image"):
        embed_folder(folder, out, checkpoint, device=CPU)
    with pytest.raises(ValueError, match="is a folder; name a file"):
        embed_folder(folder, tmp_path, checkpoint, device=CPU)
    assert not out.exists()


def test_errors_of_the_command_are_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, absent = str(fill(tmp_path / "images", 1)), str(tmp_path / "absent.safetensors")
    monkeypatch.setattr(sys, "argv", ["embed", folder, "--out", str(tmp_path / "f.parquet"), "--checkpoint", absent])
    with pytest.raises(SystemExit, match="1"):
        embed.main()
    words, errors = capsys.readouterr()
    assert words == ""
    assert "embed failed: no checkpoint at" in errors and "Traceback" not in errors


def test_a_file_that_changes_while_the_folder_is_read_is_named(tmp_path: Path, checkpoint: Path) -> None:
    """Else its features would be kept under the size and time that it had before."""
    folder, transform = fill(tmp_path / "images", 1), dino.load(checkpoint).transform
    listed = embed.File.of(folder, "d0/deeper/0000.png")
    assert embed.look_at(folder, listed, transform).crop_CPP is not None
    os.utime(folder / listed.path, (1, 1))
    assert "changed while the folder was read" in embed.look_at(folder, listed, transform).why


def test_two_processes_do_not_write_one_output(tmp_path: Path, checkpoint: Path) -> None:
    folder, out = fill(tmp_path / "images", 3), tmp_path / "features.parquet"
    facts = dict.fromkeys(("checkpoint_md5", "folder", "resize_px", "crop_px", "channels"), "")
    with (
        embed.parts_folder(out, facts),
        pytest.raises(ValueError, match=r"writes .*features.parquet"),
    ):
        embed_folder(folder, out, checkpoint, device=CPU)


def test_the_bytes_do_not_depend_on_how_rows_are_handed_over(tmp_path: Path) -> None:
    count = 2 * GROUP_ROWS + 5
    rows = np.random.default_rng(0).random((count, 3), dtype=np.float32)
    names = [f"{number}" for number in range(count)]
    for name, step in (("a", 512), ("b", 5000), ("c", count)):
        tables = (
            rows_table(names[first : first + step], names[first : first + step], rows[first : first + step])
            for first in range(0, count, step)
        )
        write_embedded(tmp_path / name, tables, {"checkpoint_md5": "", "folder": ""})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    assert np.array_equal(read_embedded(tmp_path / "a").rows_ND.numpy(), rows)
    assert pq.ParquetFile(tmp_path / "a").num_row_groups == 3
    assert json.loads(pq.read_schema(tmp_path / "a").metadata[b"dino"]) == {"checkpoint_md5": "", "folder": ""}
