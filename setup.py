"""What pyproject.toml cannot say: a wheel holds configs/ as harness/configs."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """A checkout, and an editable installation, read configs/ itself."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in self._recipes():
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        own = [] if self.editable_mode else [str(target) for _, target in self._recipes()]
        return [*super().get_outputs(include_bytecode), *own]

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *(str(source) for source, _ in self._recipes())]

    def _recipes(self) -> list[tuple[Path, Path]]:
        """Each file of configs/ and where it lies in the wheel."""
        base = Path(self.build_lib) / "harness"
        return [(path, base / path) for path in sorted(Path("configs").rglob("*.yaml"))]


setup(cmdclass={"build_py": BuildWithRecipes})
