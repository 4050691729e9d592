"""What comes with the package: recipes, and the embedded models that they use."""

from pathlib import Path


def recipes_folder() -> Path:
    """The folder of recipes: in the package, where a wheel has it, or at the root of a checkout."""
    package = Path(__file__).parent
    return next(folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir())


def builtin_models() -> dict[str, Path]:
    """Folders of embedded models, by name."""
    return {folder.parent.name: folder for folder in recipes_folder().glob("*/model") if (folder / "config.json").exists()}
