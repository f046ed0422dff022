from experiments import readme, record


def test_readmes_show_the_recorded_results():
    texts = [path.read_text() for path in readme.READMES]
    for text in texts:
        assert readme.fill_sections(text) == text, "run `python -m experiments.readme`"
    for name in readme.SECTIONS:
        assert "".join(texts).count(f"<!-- results: {name} -->") == 1


def test_every_result_was_recorded_from_a_clean_tree():
    folders = [folder.name for folder in record.RESULTS.iterdir() if folder.is_dir()]
    assert folders
    for name in folders:
        for result in record.read_all(name):
            assert not result["git"]["dirty"], result["experiment"]
            assert result["measurements"], result["experiment"]
