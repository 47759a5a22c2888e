"""The doctor finds this machine well, and what is missing."""

import pytest

from tasks import doctor


def test_run_works(capfd):
    assert [ok for ok, _ in doctor.run()] == [True]
    assert "Seed set" not in capfd.readouterr().out


def test_what_fails_is_told(monkeypatch):
    monkeypatch.setattr(doctor, "main", lambda *_: (_ for _ in ()).throw(RuntimeError("no shared memory")))
    ((ok, text),) = doctor.run()
    assert not ok
    assert "no shared memory" in text


def test_packages():
    assert all(ok for ok, _ in doctor.packages())


@pytest.mark.parametrize(
    ("line", "said"),
    [("nosuchthing>=1", "nosuchthing is missing"), ("torch>=99.1", "wanted >= 99.1"), ("numpy==0.1", "wanted == 0.1")],
)
def test_missing_or_old_packages(line, said, monkeypatch):
    monkeypatch.setattr(doctor, "requires", lambda _: [line, 'onnx>=99; extra == "export"'])
    (_, (ok, text)) = doctor.packages()
    assert not ok
    assert said in text


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    ((ok, text),) = doctor.disk(tmp_path / "file" / "runs")
    assert not ok
    assert "cannot write there" in text
