"""The command that writes features."""

from collections.abc import Sequence

from fastm3ae.cli.say import warn

__all__ = ["features"]


def features(arguments: Sequence[str]) -> None:
    """Write the features of a split's images and texts into a table."""
    import tyro

    from fastm3ae.config import FeaturesConfig

    config = tyro.cli(
        FeaturesConfig,
        args=arguments,
        prog="fastm3ae features",
        config=(tyro.conf.PositionalRequiredArgs,),
        description="Writes the features of a split: a row for each pair of an image and a text, or for each image, in "
        "the files' order, with columns that say where it comes from.",
    )

    from tqdm import tqdm

    from fastm3ae.features import extract_features

    with tqdm(desc="features", unit="item", dynamic_ncols=True) as bar:

        def progress(num_done: int, num_items: int) -> None:
            bar.total = num_items
            bar.update(num_done - bar.n)

        found = extract_features(config, progress)
    if found.bad_samples:
        warn(f"{len(found.bad_samples)} items were left out; the first: {found.bad_samples[0]}")
    widths = ", ".join(f"{name} ({width})" for name, width in found.widths.items())
    of = "images" if found.text_column is None else f"images with {found.text_column}"
    print(f"wrote {config.output}: {found.num_items} {of}: {widths}")
