"""A seeded model of devices and their radio channels, for simulations [D].

Textbook parts (A. Goldsmith, *Wireless Communications*, 2005, chapters 2 to 4): log-distance
path loss from free space at 1 m, log-normal shadowing that stays with a device, Rayleigh fading
that is drawn anew each round, and the Shannon rate. 3GPP TR 38.901, table 7.4.1-1, has path loss
of this close-in form; exponents and shadowing of the profiles lie near its values but are this
project's choice, as are the compute speeds and bandwidths. Nothing here is taken from a
published experiment.

A deployment measures its times instead and needs none of this.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_QUANTILES = 1024  # points of the mean over the fading
_FREE_SPACE_DB = 32.4  # 20 log10(4π · 1 m · 1 GHz / c), the intercept of TR 38.901
_CSV_COLUMNS = ("snr_db", "flops", "distance_m", "name")
_CSV_REQUIRED = ("snr_db", "flops")


@dataclass(frozen=True)
class Profile:
    """Parameters of a cell and of the devices in it [D].

    Parameters
    ----------
    cell_radius_m : float
        Devices are spread uniformly over a disc of this radius (m).
    min_distance_m : float
        No device is nearer to the base station than this (m), ≥ 1.
    carrier_ghz : float
        Carrier frequency (GHz).
    transmit_dbm : float
        Transmit power of a device (dBm), spread evenly over the whole band: the signal-to-noise
        ratio does not depend on a device's share of it.
    path_loss_exponent : float
        Decay with distance; 2 is free space.
    shadowing_db : float
        Standard deviation of the log-normal shadowing (dB).
    bandwidth_hz : float
        Uplink band all devices of a round share (Hz).
    flops_median : float
        Median compute speed a device sustains in training (FLOP/s).
    flops_spread : float
        Standard deviation of the natural logarithm of the compute speed.
    rayleigh : bool
        Whether the channel fades from round to round. (default: True)
    noise_dbm_per_hz : float
        Noise density (dBm/Hz). (default: -174, thermal noise at 290 K)
    noise_figure_db : float
        Loss of the receiver (dB). (default: 5)
    min_efficiency, max_efficiency : float
        Limits of the spectral efficiency (bit/s/Hz): the most robust and the densest modulation
        of the 256-QAM table 5.2.2.1-3 in 3GPP TS 38.214. The lower one keeps a deep fade from
        lasting for ever. (default: 0.1523 and 7.4063)
    """

    cell_radius_m: float
    min_distance_m: float
    carrier_ghz: float
    transmit_dbm: float
    path_loss_exponent: float
    shadowing_db: float
    bandwidth_hz: float
    flops_median: float
    flops_spread: float
    rayleigh: bool = True
    noise_dbm_per_hz: float = -174.0
    noise_figure_db: float = 5.0
    min_efficiency: float = 0.1523
    max_efficiency: float = 7.4063

    def __post_init__(self) -> None:
        problems = [
            f"{f.name} must be finite, got {getattr(self, f.name)!r}"
            for f in fields(self)
            if not math.isfinite(getattr(self, f.name))
        ]
        positive = ("carrier_ghz", "path_loss_exponent", "bandwidth_hz", "flops_median")
        for name in (*positive, "min_efficiency"):
            if getattr(self, name) <= 0:
                problems.append(f"{name} must be > 0, got {getattr(self, name)!r}")
        for name in ("shadowing_db", "flops_spread"):
            if getattr(self, name) < 0:
                problems.append(f"{name} must be ≥ 0, got {getattr(self, name)!r}")
        if not 1 <= self.min_distance_m <= self.cell_radius_m:
            problems.append(
                f"expected 1 ≤ min_distance_m ≤ cell_radius_m, got {self.min_distance_m!r} "
                f"and {self.cell_radius_m!r}"
            )
        if self.min_efficiency > self.max_efficiency:
            problems.append(
                f"min_efficiency must not exceed max_efficiency, got {self.min_efficiency!r} "
                f"and {self.max_efficiency!r}"
            )
        if problems:
            raise ValueError("invalid channel profile: " + "; ".join(problems))


PROFILES: dict[str, Profile] = {
    # Workstations near an indoor access point.
    "lab": Profile(
        cell_radius_m=30,
        min_distance_m=1,
        carrier_ghz=5.2,
        transmit_dbm=20,
        path_loss_exponent=2.0,
        shadowing_db=3,
        bandwidth_hz=80e6,
        flops_median=2e12,
        flops_spread=0.3,
    ),
    # Laptops across buildings, small cells.
    "campus": Profile(
        cell_radius_m=200,
        min_distance_m=10,
        carrier_ghz=3.5,
        transmit_dbm=23,
        path_loss_exponent=3.0,
        shadowing_db=7,
        bandwidth_hz=40e6,
        flops_median=5e11,
        flops_spread=0.6,
    ),
    # Gateways far from a tall mast, little spectrum.
    "rural": Profile(
        cell_radius_m=2000,
        min_distance_m=35,
        carrier_ghz=0.8,
        transmit_dbm=23,
        path_loss_exponent=2.8,
        shadowing_db=8,
        bandwidth_hz=10e6,
        flops_median=2e11,
        flops_spread=0.5,
    ),
    # Telephones in a city: the widest spread of speeds and channels.
    "phones": Profile(
        cell_radius_m=500,
        min_distance_m=10,
        carrier_ghz=2.6,
        transmit_dbm=23,
        path_loss_exponent=3.2,
        shadowing_db=8,
        bandwidth_hz=20e6,
        flops_median=1e11,
        flops_spread=0.9,
    ),
}


@dataclass(frozen=True)
class Devices:
    """The devices of one simulation.

    Parameters
    ----------
    profile : Profile
        Where they live: fading, limits of the spectral efficiency, bandwidth.
    snr_db : ndarray, shape (n,)
        Signal-to-noise ratio of each device, mean over the fading (dB).
    flops : ndarray, shape (n,)
        Compute speed in training (FLOP/s).
    distance_m : ndarray, shape (n,)
        Distance to the base station (m); NaN where unknown.
    names : tuple of str
        What to call them in reports.
    """

    profile: Profile
    snr_db: Array
    flops: Array
    distance_m: Array
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


def path_loss_db(profile: Profile, distance_m: Array) -> Array:
    """Return the median path loss (dB) at each distance (m): Goldsmith 2005, section 2.6."""
    loss: Array = (
        _FREE_SPACE_DB
        + 20 * math.log10(profile.carrier_ghz)
        + 10 * profile.path_loss_exponent * np.log10(distance_m)
    )
    return loss


def sample_devices(profile: Profile | str, n: int, rng: np.random.Generator) -> Devices:
    """Draw `n` devices: place, shadowing and compute speed, which stay theirs [D].

    Parameters
    ----------
    profile : Profile or str
        The surroundings, or one of the names in `PROFILES`.
    n : int
        How many devices, ≥ 0.
    rng : numpy.random.Generator
        Source of all randomness.

    Returns
    -------
    Devices

    Raises
    ------
    ValueError
        If the profile is unknown or `n` is negative.
    """
    profile = resolve_profile(profile)
    if n < 0:
        raise ValueError(f"the number of devices must be ≥ 0, got {n}")
    # The area of a disc grows with the square of its radius.
    inner, outer = profile.min_distance_m**2, profile.cell_radius_m**2
    distance = np.sqrt(rng.uniform(inner, outer, n))
    noise = profile.noise_dbm_per_hz + profile.noise_figure_db
    noise += 10 * math.log10(profile.bandwidth_hz)
    shadowing = rng.normal(0.0, profile.shadowing_db, n)
    snr = profile.transmit_dbm - path_loss_db(profile, distance) - shadowing - noise
    flops = profile.flops_median * np.exp(rng.normal(0.0, profile.flops_spread, n))
    return Devices(profile, snr, flops, distance, tuple(f"device-{i}" for i in range(n)))


def spectral_efficiency(devices: Devices, rng: np.random.Generator) -> Array:
    """Draw the spectral efficiency of every device in one round [D].

    Parameters
    ----------
    devices : Devices
        The devices.
    rng : numpy.random.Generator
        Source of the fading; untouched where the profile has none.

    Returns
    -------
    ndarray, shape (n,)
        bit/s/Hz of each device.
    """
    return efficiency_at(
        devices.profile, devices.snr_db, fading(devices.profile, rng, len(devices))
    )


def fading(profile: Profile, rng: np.random.Generator, n: int) -> Array:
    """Draw `n` power gains of the channel, of mean 1: Rayleigh fading, or 1 without fading.

    The power of a Rayleigh channel is exponential (Goldsmith 2005, section 3.2).
    """
    return rng.exponential(1.0, n) if profile.rayleigh else np.ones(n)


def efficiency_at(profile: Profile, snr_db: Array, gain: Array) -> Array:
    """Return the spectral efficiency at a mean SNR (dB) and a power gain, in bit/s/Hz.

    Shannon's ``log2(1 + SNR · g)`` (Goldsmith 2005, section 4.1) within the profile's limits;
    the shapes broadcast.
    """
    rate = np.log2(1 + 10 ** (snr_db / 10) * gain)
    clipped: Array = np.clip(rate, profile.min_efficiency, profile.max_efficiency)
    return clipped


def harmonic_efficiency(profile: Profile, snr_db: Array) -> Array:
    """Return the constant efficiency at which uploads take as long as with fading on average.

    ``1 / E[1 / efficiency]`` over the fading, by the midpoint rule in its quantiles: nothing is
    drawn [D]. The limits of the profile bound the integrand, so the rule is good to 0.1 %.

    Parameters
    ----------
    profile : Profile
    snr_db : ndarray, shape (n,)
        Mean signal-to-noise ratios (dB).

    Returns
    -------
    ndarray, shape (n,)
        bit/s/Hz.
    """
    if not profile.rayleigh:
        return efficiency_at(profile, snr_db, np.ones(1))
    gain = -np.log1p(-(np.arange(_QUANTILES) + 0.5) / _QUANTILES)
    mean: Array = 1 / (1 / efficiency_at(profile, snr_db[:, None], gain)).mean(axis=1)
    return mean


def devices_from_csv(path: str | Path, profile: Profile | str = "campus") -> Devices:
    """Read measured devices from a CSV file, one a line below a header [D].

    Columns: ``snr_db`` (dB) and ``flops`` (FLOP/s) are required, ``distance_m`` (m) and ``name``
    are optional. Empty lines and lines that begin with ``#`` are skipped.

    Parameters
    ----------
    path : str or Path
        The file, UTF-8.
    profile : Profile or str
        The surroundings: fading, limits and bandwidth. (default: "campus")

    Returns
    -------
    Devices

    Raises
    ------
    ValueError
        If the file is not as described; the message lists every problem with its line number.
    """
    profile = resolve_profile(profile)
    lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    rows = [
        (number, next(csv.reader([line])))
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if len(rows) < 2:
        raise ValueError(f"{path}: expected a header and at least one device, got no device")
    number, header = rows[0][0], [cell.strip() for cell in rows[0][1]]
    unknown = sorted(set(header) - set(_CSV_COLUMNS))
    missing = [name for name in _CSV_REQUIRED if name not in header]
    if unknown or missing or len(set(header)) < len(header):
        raise ValueError(
            f"{path}, line {number}: expected the columns {', '.join(_CSV_REQUIRED)} and "
            f"optionally distance_m, name, each once; got {', '.join(header)}"
        )
    problems: list[str] = []
    table: dict[str, list[float]] = {"snr_db": [], "flops": [], "distance_m": []}
    names: list[str] = []
    for index, (number, cells) in enumerate(rows[1:]):
        if len(cells) != len(header):
            problems.append(f"line {number}: expected {len(header)} values, got {len(cells)}")
            continue
        record = dict(zip(header, (cell.strip() for cell in cells), strict=True))
        names.append(record.get("name") or f"device-{index}")
        for column, values in table.items():
            values.append(_number(record.get(column, ""), column, number, problems))
    if problems:
        raise ValueError(f"{path}: " + "; ".join(problems))
    columns = {column: np.array(values) for column, values in table.items()}
    return Devices(profile, names=tuple(names), **columns)


def _number(text: str, column: str, line: int, problems: list[str]) -> float:
    """Read one value; what is wrong with it goes to `problems`."""
    if not text and column not in _CSV_REQUIRED:
        return math.nan
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        problems.append(f"line {line}: {column} must be a finite number, got {text!r}")
    elif column != "snr_db" and value <= 0:
        problems.append(f"line {line}: {column} must be > 0, got {text!r}")
    return value


def resolve_profile(profile: Profile | str) -> Profile:
    """Return the profile of that name, or the one given; unknown names raise ``ValueError``."""
    if isinstance(profile, Profile):
        return profile
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}: expected one of {', '.join(PROFILES)}")
    return PROFILES[profile]


def check_devices(devices: Devices) -> None:
    """Refuse devices that are none, or without a number: ``ValueError``."""
    snr, flops = np.asarray(devices.snr_db), np.asarray(devices.flops)
    if not len(devices) or {snr.shape, flops.shape} != {(len(devices),)}:
        raise ValueError(
            f"expected at least one device, with one snr_db and flops each, got {len(devices)} "
            f"names and shapes {snr.shape} and {flops.shape}"
        )
    if not (np.isfinite(snr).all() and np.isfinite(flops).all() and (flops > 0).all()):
        raise ValueError("snr_db of devices must be finite and flops finite and > 0")
