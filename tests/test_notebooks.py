"The rules of the house: floors, parameters, docments, lessons, and files that match their notebooks."
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
EXPORTING = [path for path in NOTEBOOKS if path.stem[0] == '0']
FLOORS = {path.stem[3:]: int(path.stem[:2]) for path in EXPORTING}

named = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
exporting = pytest.mark.parametrize('path', EXPORTING, ids=lambda path: path.stem)


def cells(path, kind='code'):
    return [cell for cell in json.loads(path.read_text())['cells'] if cell['cell_type'] == kind]


def sources(path, kind='code'):
    return [''.join(cell['source']) for cell in cells(path, kind)]


def exported(path):
    return [source for source in sources(path) if re.match(r'#\|\s*exports?\b', source)]


def test_there_are_notebooks():
    assert len(EXPORTING) >= 10 and (ROOT/'nbs/index.ipynb') in NOTEBOOKS


@exporting
def test_exported_imports_point_down(path):
    floor = int(path.stem[:2])
    for name in re.findall(r'from tokpost\.(\w+) import', '\n'.join(exported(path))):
        assert FLOORS[name] < floor, f"{path.stem} exports an import of {name}, floor {FLOORS[name]}"


@named
def test_numbers_above_nine_export_nothing(path):
    if path.stem[:2].isdigit() and int(path.stem[:2]) >= 10: assert not exported(path)


@exporting
def test_exports_need_neither_nbdev_nor_fastcore(path):
    assert not re.search(r'^\s*(from|import) (nbdev|fastcore|execnb)', '\n'.join(exported(path)), re.M)


def test_modules_import_where_only_torch_is():
    "Heavy libraries are imported by the functions that need them."
    heavy = ['datasets', 'diffusers', 'timm', 'lpips', 'torch_fidelity', 'torchmetrics', 'sklearn', 'matplotlib', 'pandas',
             'nbdev', 'fastcore']
    modules = ', '.join(f'tokpost.{name}' for name in sorted(FLOORS))
    code = f"import sys\nfor name in {heavy}: sys.modules[name] = None\nimport {modules}"
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)


@named
def test_papermill_parameters_are_literals(path):
    tagged = [cell for cell in cells(path) if 'parameters' in cell['metadata'].get('tags', [])]
    assert len(tagged) <= 1
    for cell in tagged:
        for statement in ast.parse(''.join(cell['source'])).body:
            assert isinstance(statement, ast.Assign)
            ast.literal_eval(statement.value)


@named
def test_notebook_is_clean(path):
    "No error in a stored output, no printed sentences, no stray kernels, no huge outputs."
    notebook = json.loads(path.read_text())
    assert notebook['metadata']['kernelspec']['name'] == 'python3'
    assert path.stat().st_size < 700_000
    for cell in cells(path):
        assert not any(output['output_type'] in ('error', 'stream') for output in cell.get('outputs', []))
        assert not re.search(r'^\s*print\(', ''.join(cell['source']), re.M)


def public_functions(path):
    for source in exported(path):
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'): yield node, lines


@exporting
def test_top_level_functions_are_documented(path):
    "A docstring, and a comment on the line of every parameter."
    for source in exported(path):
        lines = source.splitlines()
        for node in ast.parse(source).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith('_'): continue
            assert ast.get_docstring(node), f"{path.stem}: {node.name} has no docstring"
            functions = [node] if isinstance(node, ast.FunctionDef) else [
                f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == '__init__']
            for function in functions:
                arguments = [a for a in function.args.args + function.args.kwonlyargs if a.arg != 'self']
                for argument in arguments:
                    assert '#' in lines[argument.lineno-1], f"{path.stem}: {node.name}({argument.arg}) has no docment"


@named
def test_nothing_of_this_machine(path):
    text = path.read_text()
    assert not re.search(r'/(home|root|work|Users)/', text)
