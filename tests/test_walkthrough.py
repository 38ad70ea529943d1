"""The notebook docs/walkthrough.ipynb: a quick run, and what is stored."""

import ast
import json
import re
import sys

import pytest
from conftest import ROOT

from sample import n_steps

nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel")
nbclient = pytest.importorskip("nbclient")

FILE = ROOT / "docs" / "walkthrough.ipynb"
NOTEBOOK = nbformat.read(FILE, as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
QUICK = ("= 2000, 2000, 1024", "= 150, 150, 256")  # training steps of both networks, and samples


def test_it_runs_from_top_to_bottom_and_its_student_has_learnt(tmp_path, monkeypatch):
    """A quick run in a kernel of the interpreter that runs this test. It starts in docs/, as Jupyter starts it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(FILE, as_version=4)
    assert sum(QUICK[0] in cell.source for cell in notebook.cells) == 1
    for cell in notebook.cells:
        cell.source = cell.source.replace(*QUICK).replace("runs/walkthrough", str(tmp_path))
    report = "import json; samples = {name: list(x.shape) for name, x in samples.items()}"
    report += "\nprint(json.dumps([sys.prefix, table['rows'], samples, ends_off]))"
    notebook.cells.append(nbformat.v4.new_code_cell(report))
    resources = {"metadata": {"path": str(FILE.parent)}}
    options = {"kernel_name": "python3", "timeout": 300, "resources": resources, "coalesce_streams": True}
    nbclient.NotebookClient(notebook, **options).execute()
    prefix, rows, samples, ends_off = json.loads(notebook.cells[-1].outputs[0].text)
    assert prefix == sys.prefix  # and not whatever kernel is registered on this machine
    table = {(row["sampler"], row.get("steps")): row for row in rows}
    for steps in (1, 2, 4):
        assert samples[f"student, {n_steps(steps)}"] == [256, 2]
        assert table["student", steps]["W2"] < 0.9 * table["teacher, DDIM", 1]["W2"]
    assert max(ends_off["linear"]) < max(ends_off["markov"]) / 5  # which σ is right, as section 5 says


def test_what_is_stored_is_short_whole_and_of_no_machine():
    """All cells were run in order, and nothing is in the way of a reader: no error, warning, progress bar, nor a path
    of the machine that ran it."""
    assert len(NOTEBOOK.cells) <= 20 and FILE.stat().st_size < 400_000
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell.outputs]
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}  # warnings are stderr
    for cell in CODE:
        stored = [mime for output in cell.outputs for mime in output.get("data", {"text": 0})]
        for shown, kind in ((r"plt\.show|^overview|^plots\.curves", "image/png"), (r"print(_rows)?\(", "text")):
            assert bool(re.search(shown, cell.source, re.MULTILINE)) == (kind in stored), cell.id
        tree = ast.parse(re.sub("^%.*", "", cell.source, flags=re.MULTILINE))  # magics are no Python
        # It calls the project's functions and has no copies of them.
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)]
    text = "".join(output.get("text", "") for output in outputs)
    assert not re.search(r"\r|step/s|\x1b|(?<![\w.])/\w+/|[A-Z]:\\", text)  # bars, colours, paths
    assert len(re.findall(r"^student +\d +\S+ +\S+$", text, re.MULTILINE)) == 3
