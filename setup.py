"""What `pyproject.toml` cannot say: a wheel brings the C++ kernels along, compiled for some generations of processors.

Where no compiler is, and in editable installs, they are left out; then they are compiled at first use.
"""

import importlib.util
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

FOLDER = Path("allyouneed", "nn", "native")
spec = importlib.util.spec_from_file_location("building", Path("src") / FOLDER / "building.py")
building = importlib.util.module_from_spec(spec)
spec.loader.exec_module(building)


class WithKernels(build_py):
    """Python files, and the kernels beside their sources."""

    def run(self) -> None:
        """Both, but in an editable install, whose folder is the sources'."""
        super().run()
        if not self.editable_mode:
            try:
                building.ship(Path(self.build_lib) / FOLDER / "shipped")
            except OSError as error:
                self.warn(f"{error}: the wheel has no kernels; they are compiled at first use")


class ForOneMachine(bdist_wheel):
    """Any Python 3, one platform."""

    def finalize_options(self) -> None:
        """It holds machine code."""
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        """No part of it asks for a version of Python's own interface."""
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_py": WithKernels, "bdist_wheel": ForOneMachine})
