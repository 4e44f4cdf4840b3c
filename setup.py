"""What pyproject.toml cannot say of the wheel: configuration goes inside a package, large data are packed, and the
compiled core comes along where it can be compiled (`build_backend.py`)."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# Not there where setup.py is run by itself.
sys.path.insert(0, str(ROOT))

import build_backend  # noqa: E402 - see the line before

PACK_FROM = 100_000  # bytes
CORE = ROOT / "build" / "core"
"""Where it is compiled to for a wheel: in a checkout it would stay, and be found."""
BUILDS = {"bdist_wheel", "build", "build_py", "install"}
"""Commands that make what is installed."""


def packing() -> ModuleType:
    """`traces.packing`, without its package, which needs what a build does not have."""
    spec = importlib.util.spec_from_file_location("packing", ROOT / "traces" / "packing.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


class BuildPy(build_py):
    """Builds from nothing, so that no file of an earlier build comes along; puts `conf/` where `sim.paths` looks."""

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            if build_backend.wanted_by_environment():
                build_backend.try_compile()
            return
        built = Path(self.build_lib)
        shutil.rmtree(built, ignore_errors=True)
        super().run()
        for path in sorted((ROOT / "conf").rglob("*.yaml")):
            target = built / "sim" / "conf" / path.relative_to(ROOT / "conf")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        for path in sorted((built / "traces" / "data").glob("*.safetensors")):
            if path.stat().st_size >= PACK_FROM:
                path.with_name(path.name + ".packed").write_bytes(packing().pack(path.read_bytes()))
                path.unlink()
        if self.distribution.has_ext_modules():
            shutil.copytree(CORE, built / "expertflow" / "_core")


class Compiled(Distribution):
    """Not for every Python and machine: it holds extension modules, which setuptools has not made."""

    def has_ext_modules(self) -> bool:
        return True


# Before anything is built: what there is to build depends on it, and so does the name of the wheel.
compiled = bool(BUILDS.intersection(sys.argv)) and build_backend.try_compile(CORE)
setup(cmdclass={"build_py": BuildPy}, distclass=Compiled if compiled else Distribution)
