"""Builds as setuptools does, and compiles the core with mypyc where it can: `expertflow/core.py` says what the core is.

EXPERTFLOW_COMPILED in the environment of a build: 0, nothing is compiled; 1, a core that cannot be compiled ends the
build; unset, a wheel has the compiled core if there are a C compiler and mypy, else pure Python, and an editable
installation stays pure Python. `python build_backend.py` compiles the core of this checkout in place.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the hooks of PEP 517 that are not defined here

ROOT = Path(__file__).resolve().parent
NEEDED = "mypy>=1.18"
LEVEL = "3"
"""Of the C compiler's optimisation."""
MYPY = (
    *("--config-file=", "--strict", "--ignore-missing-imports", "--no-site-packages", "--follow-imports=silent"),
    "--no-warn-unused-ignores",
)
"""Options of the type check before the compilation: as in pyproject.toml, without what need not be installed, and also
where it is: to read torch and its like takes minutes, and the C code would depend on what happens to be there."""


def _load_core():
    """`expertflow/core.py`, without the package around it."""
    spec = importlib.util.spec_from_file_location("expertflow_core", ROOT / "expertflow" / "core.py")
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    return core


core = _load_core()


# -- hooks of PEP 517 and 660 ------------------------------------------------------------------------------------------


def get_requires_for_build_wheel(config_settings=None):
    """mypy too, where a C compiler could use it or the compiled core is asked for."""
    wanted = wanted_by_environment()
    needed = [NEEDED] if wanted or (wanted is None and has_c_compiler()) else []
    return [*build_meta.get_requires_for_build_wheel(config_settings), *needed]


def get_requires_for_build_editable(config_settings=None):
    """mypy only where the compiled core is asked for."""
    needed = [NEEDED] if wanted_by_environment() else []
    return [*build_meta.get_requires_for_build_editable(config_settings), *needed]


# -- compilation -------------------------------------------------------------------------------------------------------


def wanted_by_environment():
    """Whether the environment asks for the compiled core; None: it says nothing."""
    word = os.environ.get(core.SWITCH, "")
    if word not in ("", "0", "1"):
        sys.exit(f"error: {core.SWITCH}={word[:40]!r} is unknown; choose 0, 1, or unset it")
    return {"": None, "0": False, "1": True}[word]


def has_c_compiler():
    """Whether the C compiler is there that CC or this Python names. Where none is named setuptools looks for one."""
    named = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "")
    return not named or shutil.which(named[0]) is not None


def compile_core(target=None):
    """Compile the core into the folder `target`, by default where it is found: `expertflow/_core/`. RuntimeError says
    why it could not be."""
    if importlib.util.find_spec("mypyc") is None:
        raise RuntimeError("mypy, which brings mypyc, is not installed")
    if not has_c_compiler():
        raise RuntimeError("there is no C compiler")
    target = target or core.file_of(core.LIBRARY).parent
    shutil.rmtree(target, ignore_errors=True)
    # Before they are read for the compilation: what is edited meanwhile then counts as changed.
    hashes = core.hashes()
    with tempfile.TemporaryDirectory(prefix="expertflow-core-") as folder:
        # A process of its own: mypyc ends the one it runs in where it cannot compile.
        command = [sys.executable, str(ROOT / "build_backend.py"), "--into", folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        modules = (core.LIBRARY, *core.MODULES)
        files = {name: Path(folder, *name.split(".")[:-1], core.file_of(name).name) for name in modules}
        if done.returncode or not all(path.is_file() for path in files.values()):
            raise RuntimeError("mypyc or the C compiler failed:\n" + (done.stdout + done.stderr)[-4000:])
        for name, path in files.items():
            place = target / core.file_of(name).relative_to(core.file_of(core.LIBRARY).parent)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    (target / core.SOURCES).write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")


def try_compile(target=None):
    """Whether the core was compiled into `target` (see `compile_core`): said in the build's log. Ends a build that was
    to be compiled and could not be."""
    wanted = wanted_by_environment()
    if wanted is False:
        print(f"expertflow: {core.SWITCH}=0, the core stays pure Python")
        return False
    try:
        compile_core(target)
    except (RuntimeError, OSError) as error:
        if wanted:
            sys.exit(f"error: {core.SWITCH}=1, but the core was not compiled: {error}")
        print(f"expertflow: the core was not compiled and stays pure Python: {error}")
        return False
    print("expertflow: the core was compiled")
    return True


def _run_mypyc(into):
    """Compile the core of the current folder; the extension modules go below `into`, each where its name says."""
    from mypyc.build import mypycify
    from setuptools import setup

    files = [str(core.source_of(name, Path())) for name in core.MODULES]
    group = core.LIBRARY.removesuffix("__mypyc")
    options = [*MYPY, f"--cache-dir={into}/mypy", *files]
    modules = mypycify(options, opt_level=LEVEL, debug_level="0", target_dir=f"{into}/c", group_name=group)
    words = ["build_ext", f"--build-lib={into}", f"--build-temp={into}/o"]
    setup(name="expertflow-core", packages=[], ext_modules=modules, script_args=words)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--into"]:
        _run_mypyc(sys.argv[2])
    else:
        try:
            compile_core()
        except RuntimeError as error:
            sys.exit(f"error: the core was not compiled: {error}")
