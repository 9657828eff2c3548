"""Files for TensorBoard's projector: `tensorboard --logdir FOLDER` shows the vectors with pictures and labels."""

from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from simclr_ddp.system.files import replace_atomically

SPRITE = 8192  # largest side of a sprite that the projector accepts, in pixels
CONFIG = """embeddings {{
  tensor_name: "representations"
  tensor_path: "tensors.tsv"
  metadata_path: "metadata.tsv"
  sprite {{
    image_path: "sprite.png"
    single_image_dim: {side}
    single_image_dim: {side}
  }}
}}
"""


def write_projector(
    folder: Path, vectors: np.ndarray, pictures: np.ndarray, columns: dict[str, Sequence[object]]
) -> None:
    """Write tensors.tsv, metadata.tsv, sprite.png and projector_config.pbtxt of n images to an existing folder.

    vectors   float [n, D]
    pictures  uint8 [n, side, side, 3]
    columns   name -> n values, at least two columns; no name or value may hold a tab or the end of a line
    """
    count, largest = len(vectors), pictures.shape[1]
    across = int(np.ceil(np.sqrt(count)))
    side = min(largest, SPRITE // across)
    sprite = Image.new("RGB", (across * side, across * side))
    for i, picture in enumerate(pictures):
        image = Image.fromarray(picture)
        sprite.paste(image if side == largest else image.resize((side, side)), (i % across * side, i // across * side))
    encoded = BytesIO()
    sprite.save(encoded, "PNG")
    rows = [tuple(columns), *zip(*columns.values(), strict=True)]
    written = {
        "tensors.tsv": "".join("\t".join(f"{value:.6g}" for value in row) + "\n" for row in vectors.tolist()).encode(),
        "metadata.tsv": "".join("\t".join(map(str, row)) + "\n" for row in rows).encode(),
        "sprite.png": encoded.getvalue(),
        "projector_config.pbtxt": CONFIG.format(side=side).encode(),
    }
    for name, data in written.items():
        replace_atomically(folder / name, partial(Path.write_bytes, data=data))
