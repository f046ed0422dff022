import json

import pytest

from experiments import record, report


def write(tmp_path, **changes):
    arguments = {
        "config": {"width": 8},
        "measurements": [{"metric": "hr@10", "unit": "1", "value": 0.5}],
        "seeds": [0],
        "folder": tmp_path,
        "scratch": True,
    }
    return record.write("trial", **{**arguments, **changes})


def test_a_result_says_how_to_repeat_it(tmp_path):
    saved = json.loads(write(tmp_path).read_text())
    assert saved["config"] == {"width": 8}
    assert saved["seeds"] == [0]
    assert len(saved["git"]["sha"]) == 40 or saved["git"]["sha"] == "unknown"
    assert {"jax", "flax", "python", "device_kind"} <= saved["env"].keys()
    assert saved["measurements"][0]["value"] == 0.5


def test_results_are_never_overwritten(tmp_path):
    first, second = write(tmp_path), write(tmp_path)
    assert first != second
    assert len(record.read_all("trial", tmp_path)) == 2


def test_a_changed_tree_is_refused_unless_scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "git_state", lambda: {"sha": "0" * 40, "dirty": True})
    with pytest.raises(RuntimeError, match="commit first"):
        write(tmp_path, scratch=False)
    assert not list(tmp_path.iterdir())
    assert json.loads(write(tmp_path).read_text())["git"]["dirty"]


def test_data_is_described_by_its_content(tmp_path):
    (tmp_path / "a").write_text("1 2\n")
    before = record.describe_data("tiny", tmp_path / "a")
    (tmp_path / "a").write_text("1 3\n")
    after = record.describe_data("tiny", tmp_path / "a")
    assert before["name"] == after["name"] == "tiny"
    assert before["sha256"] != after["sha256"]


def test_tables_show_what_they_are_given():
    rows = [{"model": "a|b", "hr": 0.12345, "n": 1234}]
    assert report.table_markdown(rows).splitlines()[-1] == "| a|b | 0.1235 | 1,234 |"
    assert "<td class=number>0.1235</td>" in report.table_html(rows)


def test_html_is_escaped(tmp_path):
    page = report.write_page(
        tmp_path / "page.html",
        title="<script>",
        lead="a & b",
        sections=[("x", report.table_html([{"v": "<b>"}]))],
    )
    text = page.read_text()
    assert "<script>" not in text
    assert "<td>&lt;b&gt;</td>" in text


def test_sources_are_named_by_what_they_hold(monkeypatch):
    said = {"ls-files": "100644 1234 0\tkernels/a.py", "status": ""}
    monkeypatch.setattr(record, "_git", lambda command, *_: said[command])
    name = record.git_sources("kernels")
    assert name == record.git_sources("kernels")
    said["ls-files"] = "100644 5678 0\tkernels/a.py"
    assert record.git_sources("kernels") not in (name, None)
    said["status"] = " M kernels/a.py"
    assert record.git_sources("kernels") is None
    said.update({"ls-files": "", "status": ""})
    assert record.git_sources("kernels") is None, "outside a checkout"
