"""The notebook toy/walkthrough.ipynb: its first cell in all places where it may start, a quick run, what is stored."""

import ast
import json
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

import splam
from sample import n_steps

FILE = ROOT / "toy" / "walkthrough.ipynb"
NOTEBOOK = nbformat.read(FILE, as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
# Magics are no Python: a line that begins with % is IPython's.
PYTHON = [ast.parse(re.sub("^%.*", "", cell.source, flags=re.MULTILINE)) for cell in CODE]
QUICK = ("= 2000, 2000, 1024", "= 150, 150, 256")  # training steps of both networks, and samples


@pytest.mark.parametrize("start", ["root", "toy", "elsewhere", "elsewhere, a second time"])
def test_the_first_cell_finds_the_project_or_clones_it(tmp_path, start):
    """Afterwards the project's root is the working folder and can be imported from, whatever the kernel began with."""
    published, work = tmp_path / "published", tmp_path / "work"
    work.mkdir()
    published.mkdir()
    for file in ("splam.py", "requirements.txt"):  # a stand-in that is cloned fast and asks for no packages
        (published / file).write_text("")
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false", "-C", published]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    address = re.search('REPOSITORY = "(.*?)"', CODE[0].source)[1]
    cell = CODE[0].source.replace(address, str(published)) + "\nimport splam; print(splam.__file__, os.getcwd())"
    folder = {"root": ROOT, "toy": ROOT / "toy"}.get(start, work)
    for _ in range(2 if "second" in start else 1):
        done = subprocess.run([sys.executable, "-c", cell], cwd=folder, capture_output=True, text=True)
    root = work / "splam" if folder == work else ROOT
    assert done.stdout.split() == [str(root / "splam.py"), str(root)], done.stderr


def test_it_runs_from_top_to_bottom_and_its_student_has_learnt(tmp_path, monkeypatch):
    """A quick run in a kernel of the interpreter that runs this test. It starts in toy/, as Jupyter starts it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(FILE, as_version=4)
    assert sum(QUICK[0] in cell.source for cell in notebook.cells) == 1
    for cell in notebook.cells:
        cell.source = cell.source.replace(*QUICK).replace("runs/walkthrough", str(tmp_path))
    # What is asserted below, by the notebook's own variables.
    report = "import json; samples = {name: list(x.shape) for name, x in comparison.samples.items()}"
    report += "\nprint(json.dumps([sys.prefix, comparison.rows, samples, ends_off]))"
    notebook.cells.append(nbformat.v4.new_code_cell(report))
    resources = {"metadata": {"path": str(FILE.parent)}}
    NotebookClient(notebook, kernel_name="python3", timeout=300, resources=resources, coalesce_streams=True).execute()
    prefix, rows, samples, ends_off = json.loads(notebook.cells[-1].outputs[0].text)
    assert prefix == sys.prefix  # and not whatever kernel is registered on this machine
    table = {(row["sampler"], row.get("steps")): row for row in rows}
    for steps in (1, 2, 4):
        assert samples[f"student, {n_steps(steps)}"] == [256, 2]
        # A student's step is better than the teacher's. (2 and 4 of a teacher are better than so short a training.)
        assert table["student", steps]["W2"] < 0.8 * table["teacher, DDIM", 1]["W2"]
    assert table["student", 1]["map error"] < 0.8 * table["teacher, DDIM", 1]["map error"]
    assert max(ends_off["approx"]) < max(ends_off["exact"]) / 5  # which σ is right, as section 5 says


def test_what_is_stored_is_short_whole_and_of_no_machine():
    """At most 20 cells and 600 kB, all run in order, with pictures and the last table, and nothing that is in the way
    of a reader: no error, no warning, no progress bar, no path of the machine that ran it."""
    assert len(NOTEBOOK.cells) <= 20 and FILE.stat().st_size < 600_000
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}  # warnings are stderr
    # A cell that ends in a picture, or in a table, has it.
    for cell in CODE:
        stored = [mime for output in cell.outputs for mime in output.get("data", {"text": output.get("text")})]
        drawn = re.search(r"plt\.show|^overview|^plots\.curves", cell.source, re.MULTILINE)
        assert bool(drawn) == ("image/png" in stored), cell.id
        assert bool(re.search(r"print(_rows)?\(", cell.source)) == ("text" in stored), cell.id
    text = "".join(output.get("text") or output.data.get("text/plain", "") for output in outputs)
    bars, colours, absolute_paths = r"\r|step/s|batch/s", r"\x1b", r"(?<![\w.])/\w+/|[A-Z]:\\"
    assert not re.search(f"{bars}|{colours}|{absolute_paths}", text)
    student = re.findall(r"^student +(\d) +(\S+) +(\S+)$", text, re.MULTILINE)
    assert [int(steps) for steps, _, _ in student] == [1, 2, 4]
    # What the text says of the full run: the teacher's many steps are needed, and the student's one does as well.
    (teacher_1,) = re.findall(r"^teacher, DDIM +1 +(\S+)", text, re.MULTILINE)
    assert all(float(w2) < 0.2 * float(teacher_1) for _, w2, _ in student)


def test_it_uses_the_projects_functions_and_has_no_copies():
    nodes = [node for tree in PYTHON for node in ast.walk(tree)]
    assert not [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)]
    assigned = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    assert not assigned & {name for name in vars(splam) if callable(getattr(splam, name))}
    called = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    assert called >= {"multiple_estimation", "sub_path_point", "distill.configure", "distill.Distillation", "compare"}
