"""Draws a small pet data set in the layout of Oxford-IIIT Pet, for the demo and the tests.

The pictures are SYNTHETIC: scores on them show that the code works and are not comparable to any benchmark. Cats and
dogs share coats, sizes, poses and backgrounds; they differ in the shape of ears, face, body and tail.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from utils.files import InputError, atomic_path, write_bytes

MARKER = "SYNTHETIC.txt"
BAND = 5  # width in pixels of the boundary band
SMOOTH = 2  # drawn this many times larger and scaled down, for smooth edges


def draw_dataset(base: Path, count: int, *, seed: int = 0) -> None:
    """Draw `count` pets, one cat to two dogs, half for training, into base/images and base/annotations. The same
    seed draws the same pictures. A second call does nothing, or completes an interrupted one. InputError when `base`
    holds other data, which stay unchanged."""
    drawing = f"{count} synthetic pets, drawn by dataset/synthetic.py with seed {seed}"
    annotations = base / "annotations"
    if (base / MARKER).exists():
        held = (base / MARKER).read_text(encoding="utf-8").split(". ")[0]
        if held != drawing:
            raise InputError(f"--synthetic: {base} holds {held}, not {drawing}; use another folder")
        if (annotations / "test.txt").exists():
            return
    elif any((base / name).exists() for name in ("images", "annotations", "TrainVal", "Test")):
        raise InputError(f"--synthetic: {base} holds other data, not to be mixed with drawings; use another folder")
    write_bytes(base / MARKER, f"{drawing}. Scores on them are not comparable to any benchmark.\n".encode())

    lines: dict[str, list[str]] = {"list": [], "trainval": [], "test": []}
    for index in tqdm(range(count), "draw", unit="image"):
        species = 2 if index % 3 else 1
        number = index // 3 + 1 if species == 1 else index - index // 3  # within the species
        name = f"{'Synthetic_cat' if species == 1 else 'synthetic_dog'}_{number}"
        image, trimap = draw_pet(species, np.random.default_rng([seed, index]))
        with atomic_path(base / "images" / f"{name}.jpg") as temporary:
            Image.fromarray(image).save(temporary, "JPEG", quality=92)
        with atomic_path(annotations / "trimaps" / f"{name}.png") as temporary:
            Image.fromarray(trimap).save(temporary, "PNG")
        for subset in ("list", "trainval" if number % 2 else "test"):
            lines[subset].append(f"{name} {species} {species} {number}")
    for name, rows in lines.items():  # test.txt last: it marks the data as complete
        write_bytes(annotations / f"{name}.txt", ("\n".join(sorted(rows)) + "\n").encode())


def draw_pet(species: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One picture (H, W, 3) uint8 and its trimap (H, W) uint8: 1 pet, 2 background, 3 boundary."""
    width, height = rng.integers(180, 300, 2).tolist()
    parts = _place(_cat(rng) if species == 1 else _dog(rng), width, height, rng)
    coat = rng.uniform(40, 220, 3) * 0.35 + rng.uniform(40, 220) * 0.65

    tones = Image.new("F", (width * SMOOTH, height * SMOOTH), 0.0)  # brightness of each part; 0 outside the pet
    draw = ImageDraw.Draw(tones)
    for points, tone in parts:
        draw.polygon((points * SMOOTH).ravel().tolist(), fill=tone)
    inside = Image.fromarray((np.asarray(tones) > 0).astype(np.float32))
    tone, cover = (np.asarray(full.resize((width, height), Image.Resampling.BOX)) for full in (tones, inside))

    tone = np.divide(tone, cover, out=np.ones_like(tone), where=cover > 0)
    fur = coat * tone[..., None] * _fur(height, width, rng)[..., None]
    image = _background(width, height, coat, rng) * (1 - cover[..., None]) + fur * cover[..., None]
    image = image * rng.uniform(0.75, 1.2) + rng.normal(0, 5, image.shape)

    pet = Image.fromarray((cover > 0.5).astype(np.uint8))
    core = np.asarray(pet.filter(ImageFilter.MinFilter(BAND)))
    around = np.asarray(pet.filter(ImageFilter.MaxFilter(BAND)))
    trimap = np.where(core, 1, np.where(around, 3, 2)).astype(np.uint8)
    return image.clip(0, 255).astype(np.uint8), trimap


# A part is a polygon (N, 2) and its brightness. Coordinates: x to the right, y down, the body's center at (0, 0), the
# pet about 2 units long and looking to the right.
Point = tuple[float, float] | np.ndarray
Part = tuple[np.ndarray, float]


def _cat(rng: np.random.Generator) -> list[Part]:
    head = np.array([0.72, -0.52]) + rng.uniform(-0.08, 0.08, 2)
    tail_up = rng.uniform(-1.0, -0.2)
    tail = [(-0.6, -0.1), (-0.95, tail_up / 2), (-0.9, tail_up), (-0.7, tail_up - 0.15)]
    return [
        (_stroke(tail, 0.05, 0.04), 0.9),
        *_legs(rng, length=0.62, width=0.075),
        (_ellipse((0, 0), (0.72, 0.3), rng.uniform(-0.15, 0.05)), 1.0),
        (_stroke([(0.45, -0.15), head], 0.2, 0.2), 1.0),
        *((head + [(side * 0.26, -0.1), (side * 0.22, -0.5), (side * 0.02, -0.22)], 0.8) for side in (-1, 1)),  # ears
        (_ellipse(head, (0.29, 0.26)), 1.08),
        *_face(head, eyes=0.13, nose=(0.0, 0.08)),
    ]


def _dog(rng: np.random.Generator) -> list[Part]:
    head = np.array([0.78, -0.5]) + rng.uniform(-0.08, 0.08, 2)
    return [
        (_stroke([(-0.62, -0.15), (-0.85, -0.15 - rng.uniform(0.1, 0.35))], 0.09, 0.06), 0.9),  # tail
        *_legs(rng, length=0.75, width=0.11),
        (_ellipse((-0.1, 0.0), (0.62, 0.32), rng.uniform(-0.1, 0.1)), 1.0),
        (_ellipse((0.35, 0.02), (0.36, 0.42)), 1.0),  # deep chest
        (_stroke([(0.42, -0.15), head], 0.27, 0.22), 1.0),
        (_ellipse(head, (0.28, 0.27)), 1.08),
        (_ellipse(head + [0.3, 0.1], (0.26, 0.15), 0.15), 1.0),  # snout
        (_ellipse(head + [-0.17, 0.13], (0.12, 0.3), rng.uniform(-0.1, 0.4)), 0.65),  # hanging ear
        *_face(head + [0.08, -0.02], eyes=0.09, nose=(0.42, 0.07)),
    ]


def _legs(rng: np.random.Generator, *, length: float, width: float) -> list[Part]:
    legs = []
    for x, tone in ((-0.5, 0.7), (0.42, 0.7), (-0.42, 0.95), (0.52, 0.95)):  # the far pair darker
        foot = x + rng.uniform(-0.2, 0.2)
        legs.append((_stroke([(x, 0.1), (foot, length), (foot + 0.1, length)], width, width * 0.8), tone))
    return legs


def _face(head: np.ndarray, *, eyes: float, nose: tuple[float, float]) -> list[Part]:
    parts = [(_ellipse(head + [side * eyes, -0.06], (0.035, 0.045)), 0.12) for side in (-1, 1)]
    return [*parts, (_ellipse(head + nose, (0.05, 0.035)), 0.2)]


def _ellipse(center: Point, radii: Point, angle: float = 0.0) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    return np.stack([np.cos(t), np.sin(t)], axis=1) * radii @ _rotation(angle) + center


def _stroke(line: list[Point], start: float, end: float) -> np.ndarray:
    """A polyline with round joints, its half width going from `start` to `end`, as one polygon."""
    line = np.array(line, float)
    t = np.linspace(0, len(line) - 1, 24)
    points = np.stack([np.interp(t, np.arange(len(line)), line[:, axis]) for axis in (0, 1)], axis=1)
    normal = np.gradient(points, axis=0)[:, ::-1] * [-1, 1]
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
    half = np.linspace(start, end, len(points))[:, None]
    return np.concatenate([points + normal * half, (points - normal * half)[::-1]])


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _place(parts: list[Part], width: int, height: int, rng: np.random.Generator) -> list[Part]:
    """Turn, mirror, scale and move a pet into a picture of width x height pixels; ears and paws may leave it."""
    scale = min(width, height) * rng.uniform(0.3, 0.48)
    mirror = np.array([rng.choice([-1, 1]), 1])
    center = np.array([width, height]) * rng.uniform(0.42, 0.58, 2)
    rotation = _rotation(rng.uniform(-0.3, 0.3))
    return [((points * mirror) @ rotation * scale + center, tone) for points, tone in parts]


def _fur(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Brightness (H, W) around 1: fine hair, and plain, striped or spotted."""
    y, x = np.mgrid[:height, :width]
    hair = _smooth_noise(height, width, 2, rng) * 0.12
    kind = rng.integers(3)
    angle, wavelength = rng.uniform(0, np.pi), rng.uniform(10, 24)
    phase = 2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / wavelength
    wave = np.sin(phase + 2 * _smooth_noise(height, width, 16, rng))
    pattern = (0.0, 0.25 * (wave > 0.3), 0.35 * (_smooth_noise(height, width, 14, rng) > 0.6))[kind]
    return 1 + hair - pattern


def _smooth_noise(height: int, width: int, cell: float, rng: np.random.Generator) -> np.ndarray:
    """Normal noise (H, W) that varies over about `cell` pixels."""
    shape = (max(2, int(height / cell)), max(2, int(width / cell)))
    coarse = Image.fromarray(rng.normal(0, 1, shape).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def _background(width: int, height: int, coat: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A gradient cluttered with shapes, some of the coat's own color, more or less out of focus: (H, W, 3) float."""
    top, bottom = rng.uniform(20, 235, (2, 3))
    gradient = top + (bottom - top) * np.linspace(0, 1, height)[:, None, None]
    picture = Image.fromarray(np.broadcast_to(gradient, (height, width, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(6, 16)):
        color = coat * rng.uniform(0.7, 1.2) if rng.random() < 0.4 else rng.uniform(10, 245, 3)
        fill = tuple(color.clip(0, 255).astype(int).tolist())
        center = rng.uniform(0, 1, 2) * [width, height]
        radii = rng.uniform(0.04, 0.22, 2) * min(width, height)
        kind = rng.integers(3)
        if kind == 0:
            points = _ellipse(center, radii, rng.uniform(0, np.pi))
        elif kind == 1:
            points = center + rng.uniform(-1, 1, (int(rng.integers(3, 6)), 2)) * radii * 1.5
        else:
            points = _stroke([center, center + rng.uniform(-3, 3, 2) * radii], *radii / 4)
        draw.polygon(points.ravel().tolist(), fill=fill)
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 2.5)))
    return np.asarray(picture) + 8 * _smooth_noise(height, width, 3, rng)[..., None]
