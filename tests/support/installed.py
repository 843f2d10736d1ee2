"""The package as pip installs it, for tests in an environment that has its sources alone."""

from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[2]


def install_metadata(folder: Path) -> Path:
    """Writes the metadata that pip makes of pyproject.toml, and returns the folder."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = folder / f"{project['name']}-{project['version']}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    return folder
