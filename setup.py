"""What pyproject.toml cannot say of the wheel: configuration goes inside a package, large data are packed."""

from __future__ import annotations

import lzma
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PACK_FROM = 200_000  # bytes
# Small symbols in whole bytes and pairs of them: 3 % smaller than by default.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 1, "pb": 1}]


class BuildPy(build_py):
    """Builds from nothing, so that no file of an earlier build comes along; puts `conf/` where `sim.paths` looks."""

    def run(self) -> None:
        if self.editable_mode:
            super().run()
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
                packed = lzma.compress(path.read_bytes(), format=lzma.FORMAT_XZ, filters=FILTERS)
                path.with_name(path.name + ".xz").write_bytes(packed)
                path.unlink()


setup(cmdclass={"build_py": BuildPy})
