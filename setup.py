"""Map the top-level folders onto one import package: `kernels/` is imported as `madpo.kernels`.

`import madpo` itself runs the `__init__.py` in `typings/madpo`, which an editable install takes as it is.
"""

from setuptools import find_namespace_packages, setup

FOLDERS = ("launch", "trainer", "kernels", "configs", "slurm", "benchmarks")
EXCLUDED = ("*__pycache__*", "benchmarks.results")

setup(
    package_dir={"madpo": "typings/madpo", **{f"madpo.{folder}": folder for folder in FOLDERS}},
    packages=[
        "madpo",
        *(
            f"madpo.{package}"
            for folder in FOLDERS
            for package in find_namespace_packages(include=[folder, f"{folder}.*"], exclude=EXCLUDED)
        ),
    ],
    package_data={
        "madpo.configs": ["*.yaml"],
        "madpo.configs.templates": ["*.yaml"],
        "madpo.slurm": ["*.sbatch"],
        "madpo.trainer.reports.templates": ["*"],
    },
)
