from pathlib import Path

from experiments import record, report

README = Path(__file__).parents[2] / "README.md"


def test_readme_shows_the_recorded_results():
    text = README.read_text()
    assert report.fill_sections(text) == text, "run `python -m experiments.report`"


def test_every_result_was_recorded_from_a_clean_tree():
    folders = [folder.name for folder in record.RESULTS.iterdir() if folder.is_dir()]
    assert folders
    for name in folders:
        for result in record.read_all(name):
            assert not result["git"]["dirty"], result["experiment"]
            assert result["measurements"], result["experiment"]
