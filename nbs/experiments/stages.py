"""What the Snakefile leans on: checked parameters, fingerprints of code, notebooks that papermill runs."""

import argparse
import ast
import difflib
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import NoSuchKernel
from nbclient.exceptions import DeadKernelError
from pydantic import TypeAdapter, ValidationError

import smfnet
from smfnet.core.checks import InputError
from smfnet.core.command import run_command
from smfnet.core.provenance import provenance, sha256, write_json

HOME = Path(smfnet.__file__).parent
TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict}


class NotebookFailure(RuntimeError):
    """A notebook stopped: the message names notebook, cell and error, and the executed copy."""


def code_cells(notebook) -> list:
    """Code cells of a notebook; `InputError` if it cannot be read."""
    try:
        return [c for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == "code"]
    except OSError as e:
        raise InputError(f"{notebook}: cannot be read ({e.strerror}); check the path") from e
    except Exception as e:  # whatever nbformat finds
        raise InputError(f"{notebook}: is not a notebook ({e}); restore the file") from e


def parameters(notebook) -> dict[str, tuple]:
    """Type, default and meaning of each line of the `parameters` cell; `InputError` for other forms."""
    tagged = [c.source for c in code_cells(notebook) if "parameters" in c.metadata.get("tags", ())]
    if len(tagged) != 1:
        raise InputError(f"{notebook}: {len(tagged)} cells carry the tag 'parameters'; exactly one must")
    try:
        found = papermill.inspect_notebook(str(notebook)).values()
        untyped = [p for p in found if p["inferred_type_name"] == "None"]
        if untyped or len(found) != len(ast.parse(tagged[0]).body):
            raise ValueError("a line is no typed parameter")
        kind = lambda p: eval(p["inferred_type_name"], {"__builtins__": TYPES})
        return {p["name"]: (kind(p), ast.literal_eval(p["default"]), p["help"]) for p in found}
    except (ValueError, SyntaxError, NameError, TypeError) as e:
        form = f"write 'name: type = literal  # meaning' with types of {', '.join(TYPES)}"
        raise InputError(f"{notebook}: the parameters cell cannot be read ({e}); {form}") from e


def check_parameters(notebook, given: dict) -> dict:
    """All parameters of a notebook; `InputError` for a name that it lacks or a value of another type."""
    known = parameters(notebook)
    for name in (n for n in given if n not in known):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"it has {', '.join(known)}"
        raise InputError(f"{notebook}: has no parameter '{name}'; {hint}")
    complete = {name: given.get(name, default) for name, (_, default, _) in known.items()}
    for name, value in complete.items():
        kind = known[name][0]
        try:
            TypeAdapter(kind).validate_python(value, strict=True)
        except ValidationError as e:
            text = kind.__name__ if type(kind) is type else kind
            message = f"{notebook}: {name}={value!r} is not of type {text}; pass such a value"
            raise InputError(message) from e
    return complete


# --- code ---------------------------------------------------------------------------------------------------


def tree(source: str) -> ast.Module:
    """Syntax tree of a cell or module; lines that only Jupyter understands do not count."""
    return ast.parse(re.sub(r"(?m)^(\s*)[%!].*", r"\1pass", source))


def digest(code: ast.Module) -> str:
    """Short checksum of code; comments and layout do not count."""
    return hashlib.sha256(ast.dump(code).encode()).hexdigest()[:16]


def imports(code: ast.Module, package: str) -> set[str]:
    """Names that code imports from this project, with module; relative imports start from `package`."""
    found = set()
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {f"{base}.{a.name}" for a in node.names}
    return {name for name in found if name.split(".")[0] == "smfnet"}


@functools.cache
def module(file: Path) -> tuple[str, set[str], dict[str, str]]:
    """Checksum of a module, what it imports, and what its front door loads: name -> module."""
    code = tree(file.read_text(encoding="utf-8"))
    calls = [n for n in ast.walk(code) if isinstance(n, ast.Call)]
    doors = [c.args[1] for c in calls if getattr(c.func, "id", "") == "front_door"]
    package = ".".join(file.relative_to(HOME.parent).parts[:-1])
    return digest(code), imports(code, package), ast.literal_eval(doors[0]) if doors else {}


def fingerprint(notebook) -> dict[str, str]:
    """Checksums of a notebook's code and of this project's modules that it imports, also through others."""
    code = tree("\n".join(c.source for c in code_cells(notebook)))
    found, queue = {Path(notebook).name: digest(code)}, imports(code, "")
    while queue:
        parts = queue.pop().split(".")
        steps = [HOME.joinpath(*parts[1:n]) for n in range(1, len(parts) + 1)]
        files = [f for s in steps for f in (s / "__init__.py", s.with_suffix(".py")) if f.is_file()]
        for file in files:
            checksum, names, door = module(file)
            if (name := file.relative_to(HOME.parent).as_posix()) not in found:
                found[name], queue = checksum, queue | names
            if file.parent == steps[-1].parent and parts[-1] in door:
                queue.add(".".join([*parts[:-1], door[parts[-1]], parts[-1]]))
    return dict(sorted(found.items()))


# --- running a notebook -------------------------------------------------------------------------------------


class Manager(AsyncKernelManager):
    """A kernel that ends on request; jupyter_client interrupts it first, which an idle kernel reports."""

    held = ()  # open locks, which the kernel gets too: a stage lasts as long as its kernel

    async def start_kernel(self, **options):
        """Start the kernel with the locks of this process; it shows progress as lines."""
        env = {**os.environ, "SMFNET_PROGRESS": "lines", "TQDM_MININTERVAL": "5"}
        return await super().start_kernel(pass_fds=self.held, env=env, **options)

    async def shutdown_kernel(self, now=False, restart=False):
        """Ask the kernel to end; kill it if it does not."""
        await self.request_shutdown(restart=restart)
        await self.finish_shutdown(restart=restart)
        await self.cleanup_resources(restart=restart)


class Progress:
    """Takes what a notebook writes to its error stream, and shows now and then how far it is."""

    def __init__(self, name: str, every: float):
        self.name, self.every, self.due = name, every, time.monotonic() + every

    def write(self, text: str) -> None:
        """Show the last bar, or the last line with 'n of N', if it is time to."""
        bar, line = r"([^\r\n]*?):? *\d+%\|[^\r\n]*?\| *(\d+)/(\d+)", r"([^\r\n]*\d+ of \d+[^\r\n]*)"
        told = re.findall(f"{bar}|{line}", text)
        if told and time.monotonic() >= self.due:
            what, n, total, said = told[-1]
            print(f"{self.name}: {said or f'{what} {n} of {total}'.strip()}", file=sys.stderr, flush=True)
            self.due = time.monotonic() + self.every

    def flush(self) -> None:
        """Nothing is held back."""


def where(notebook, source: str) -> str:
    """Notebook and cell of a piece of code, for a message."""
    cells = [c.source for c in code_cells(notebook)]
    number = f"code cell {cells.index(source) + 1}" if source in cells else "a cell"
    line = next((x for x in source.splitlines() if x.strip() and not x.startswith("#")), "")
    return f"{notebook}: {number} (`{line.strip()[:60]}`)"


def execute(notebook, executed: Path, params: dict, every: float | None) -> None:
    """Run a notebook with papermill; `NotebookFailure` names the cell that stopped it."""
    options = {"kernel_manager_class": Manager, "extra_arguments": ["--log-level=ERROR"]}
    if every is not None:
        options["stderr_file"] = Progress(executed.parent.name, every)
    try:
        papermill.execute_notebook(
            notebook, executed, parameters=params, kernel_name="python3", progress_bar=False, **options
        )
        return
    except papermill.PapermillExecutionError as e:
        said = f"{where(notebook, e.source)} raised {e.ename}: {e.evalue}"
    except NoSuchKernel as e:
        raise InputError(f"kernel 'python3' is not installed; install ipykernel ({e})") from e
    except DeadKernelError:
        ran = [c for c in code_cells(executed) if c.metadata["papermill"]["status"] != "pending"]
        said = f"{where(notebook, ran[-1].source)} ended the kernel; was there enough memory?"
    raise NotebookFailure(f"{said}\nexecuted copy: {executed}")


def run_notebook(
    notebook, *, output_dir, params=None, inputs=(), outputs=(), cwd=None, progress=False, every=20.0
) -> Path:
    """Check, run and record a notebook: executed.ipynb, params.json and, after success, provenance.json."""
    before, folder, started = os.getcwd(), Path(output_dir), time.monotonic()
    os.chdir(cwd or before)
    try:
        complete = check_parameters(notebook, params or {})
        write_json(folder / "params.json", complete)
        (folder / "provenance.json").unlink(missing_ok=True)
        made = provenance(notebook=notebook, params=complete, inputs=inputs, seed=complete.get("seed"))
        execute(notebook, folder / "executed.ipynb", complete, every if progress else None)
        if missing := [o for o in outputs if not Path(o).exists()]:
            raise NotebookFailure(f"{notebook}: ran to its end but did not make {', '.join(missing)}")
        made["seconds"] = round(time.monotonic() - started, 1)
        made["outputs"] = {o: sha256(o) for o in outputs}
        write_json(folder / "provenance.json", made)
        return (folder / "executed.ipynb").absolute()
    finally:
        os.chdir(before)


def hold(path, wait: str = "") -> int | None:
    """Take a lock that ends with this process, however it ends; None if it is taken and `wait` is empty."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            os.close(lock)
            return None
        print(wait.format(Path(path).read_text()), file=sys.stderr, flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    os.ftruncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())
    return lock


# --- graphics cards -----------------------------------------------------------------------------------------


def cards() -> list[str]:
    """Names of the graphics cards that this process may use; nothing is asked of CUDA for that."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return re.findall(r"(?m)^GPU (\d+):", done.stdout)


def wanted_cards(params: dict) -> int:
    """How many cards a stage computes on: one, or one a process; none without device=cuda."""
    return params.get("processes", 1) if str(params.get("device", "")).startswith("cuda") else 0


def take_cards(count: int) -> tuple[int, ...]:
    """Cards for this job alone, named in CUDA_VISIBLE_DEVICES; their locks, or `InputError`."""
    taken, found = {}, cards()
    if count > len(found):
        raise InputError(f"device: cuda, on {count} card(s), but there are {len(found)} here; use device=cpu")
    while len(taken) < count:
        for name in (n for n in found if n not in taken and len(taken) < count):
            if (lock := hold(f".snakemake/cards/{name}")) is not None:
                taken[name] = lock
        if len(taken) < count:  # a stage that somebody runs by hand has the card
            time.sleep(1)
    if count:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
    return tuple(taken.values())


def job_of(text: str) -> dict:
    """What a rule passes to a notebook; `InputError` if it is not JSON of that form."""
    try:
        job = json.loads(text)
    except ValueError as e:
        raise InputError(f"job: is not JSON ({e}); see the options of this program") from e
    if not isinstance(job, dict) or not set(job) <= {"params", "inputs"}:
        raise InputError('job: give {"params": {...}, "inputs": [...]}')
    return job


def stage(argv: list[str] | None) -> int:
    """Run one notebook, as the rules do; 0 success, 1 the notebook failed, 2 bad input."""
    parser = argparse.ArgumentParser(prog="stages.py", description=stage.__doc__)
    parser.add_argument("notebook")
    parser.add_argument("folder", help="receives executed.ipynb, params.json and provenance.json")
    parser.add_argument("job", nargs="?", default="{}", help='JSON: {"params": {...}, "inputs": [...]}')
    parser.add_argument("outputs", nargs="*", help="files and folders that it must make")
    args, started = parser.parse_args(argv), time.monotonic()
    try:
        job = job_of(args.job)
        lock = f".snakemake/running/{args.folder.strip('/').replace('/', '-')}"
        Manager.held = (hold(lock, "waiting for process {}, which runs this stage"),)
        for path in (p for p in job.get("inputs", ()) if not Path(p).exists()):
            raise InputError(f"{path}: is not there; run the stage that makes it first")
        outputs = [o for o in args.outputs if Path(o).name != "provenance.json"]
        params = check_parameters(args.notebook, job.get("params", {}))
        Manager.held += take_cards(wanted_cards(params))
        run_notebook(args.notebook, output_dir=args.folder, outputs=outputs, progress=True, **job)
    except (InputError, NotebookFailure) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2 if isinstance(e, InputError) else 1
    print(f"{Path(args.folder).name}: done in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command: `stage`, and what else may go wrong in one line."""
    return run_command(lambda: stage(argv), prefix="error")


if __name__ == "__main__":
    sys.exit(main())
