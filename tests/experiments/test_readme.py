from experiments import record, report


def test_readmes_show_the_recorded_results():
    texts = [readme.read_text() for readme in report.READMES]
    for text in texts:
        assert report.fill_sections(text) == text, "run `python -m experiments.report`"
    for name in report.SECTIONS:
        assert "".join(texts).count(f"<!-- results: {name} -->") == 1


def test_every_result_was_recorded_from_a_clean_tree():
    folders = [folder.name for folder in record.RESULTS.iterdir() if folder.is_dir()]
    assert folders
    for name in folders:
        for result in record.read_all(name):
            assert not result["git"]["dirty"], result["experiment"]
            assert result["measurements"], result["experiment"]
