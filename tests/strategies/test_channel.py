from dataclasses import replace

import numpy as np
import pytest
from scipy.integrate import quad

from strategies.wallclock.channel import (
    PROFILES,
    Devices,
    devices_from_csv,
    path_loss_db,
    sample_devices,
    spectral_efficiency,
)


def devices_at(snr_db, n, **changes):
    profile = replace(PROFILES["campus"], **changes)
    column = np.full(n, float(snr_db))
    return Devices(profile, column, column, column, tuple(map(str, range(n))))


def test_path_loss_is_free_space_at_one_metre_and_falls_by_the_exponent():
    profile = replace(PROFILES["lab"], carrier_ghz=2.0, path_loss_exponent=3.0)
    loss = path_loss_db(profile, np.array([1.0, 10.0, 100.0]))
    free_space = 20 * np.log10(4 * np.pi * 1.0 * 2.0e9 / 299_792_458)
    assert loss[0] == pytest.approx(free_space, abs=0.06)
    assert np.diff(loss) == pytest.approx([30, 30])


def test_link_budget_by_hand():
    profile = replace(
        PROFILES["rural"], cell_radius_m=1000, min_distance_m=1000, shadowing_db=0, flops_spread=0
    )
    devices = sample_devices(profile, 1, np.random.default_rng(0))
    loss = 32.4 + 20 * np.log10(0.8) + 28 * 3
    assert devices.snr_db[0] == pytest.approx(23 - loss - (-174 + 5 + 70))
    assert devices.flops[0] == pytest.approx(2e11)


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_are_plausible(name):
    devices = sample_devices(name, 4000, np.random.default_rng(0))
    profile = PROFILES[name]
    assert len(devices) == 4000
    assert devices.distance_m.min() >= profile.min_distance_m
    assert devices.distance_m.max() <= profile.cell_radius_m
    # uniform over the area: half of it lies within r/√2
    inside = np.mean(devices.distance_m < profile.cell_radius_m / 2**0.5)
    assert inside == pytest.approx(0.5, abs=0.03)
    assert np.median(devices.flops) == pytest.approx(profile.flops_median, rel=0.1)
    assert np.log(devices.flops).std() == pytest.approx(profile.flops_spread, rel=0.1)
    efficiency = spectral_efficiency(devices, np.random.default_rng(1))
    assert efficiency.min() >= profile.min_efficiency
    assert efficiency.max() <= profile.max_efficiency
    assert 0.3 < np.median(efficiency) <= profile.max_efficiency


def test_mean_rate_under_fading_is_the_ergodic_capacity():
    devices = devices_at(10, 200_000, min_efficiency=1e-9, max_efficiency=1e9)
    mean = spectral_efficiency(devices, np.random.default_rng(0)).mean()
    capacity, _ = quad(lambda g: np.log2(1 + 10 * g) * np.exp(-g), 0, np.inf)
    assert mean == pytest.approx(capacity, rel=0.005)


def test_without_fading_the_rate_is_shannons():
    assert spectral_efficiency(
        devices_at(0, 2, rayleigh=False), np.random.default_rng(0)
    ) == pytest.approx([1, 1])


def test_seeded_and_fresh_each_round():
    first, second = (sample_devices("phones", 5, np.random.default_rng(7)) for _ in range(2))
    np.testing.assert_array_equal(first.snr_db, second.snr_db)
    rng = np.random.default_rng(7)
    rounds = [spectral_efficiency(first, rng) for _ in range(2)]
    assert not np.array_equal(*rounds)
    np.testing.assert_array_equal(rounds[0], spectral_efficiency(first, np.random.default_rng(7)))
    assert len(sample_devices("lab", 0, rng)) == 0


def test_bad_profiles():
    with pytest.raises(ValueError, match=r"unknown profile 'moon': expected one of lab, campus"):
        sample_devices("moon", 1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="number of devices"):
        sample_devices("lab", -1, np.random.default_rng(0))
    with pytest.raises(
        ValueError, match=r"bandwidth_hz must be > 0.*shadowing_db must be ≥ 0.*min_distance_m"
    ):
        replace(PROFILES["lab"], bandwidth_hz=0, shadowing_db=-1, min_distance_m=100)
    with pytest.raises(ValueError, match="carrier_ghz must be finite"):
        replace(PROFILES["lab"], carrier_ghz=np.nan)
    with pytest.raises(ValueError, match="must not exceed max_efficiency"):
        replace(PROFILES["lab"], min_efficiency=8)


def test_csv(tmp_path):
    path = tmp_path / "devices.csv"
    path.write_text(
        "# measured in May\n flops, snr_db, name\n\n1e12, 12.5, desk\n2e11,-3,\n", encoding="utf-8"
    )
    devices = devices_from_csv(path, "phones")
    assert devices.names == ("desk", "device-1")
    assert devices.flops.tolist() == [1e12, 2e11]
    assert devices.snr_db.tolist() == [12.5, -3]
    assert np.isnan(devices.distance_m).all()
    assert devices.profile is PROFILES["phones"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a header and at least one device"),
        ("snr_db,flops\n", "expected a header and at least one device"),
        ("# x\nsnr_db,speed\n1,2\n", "line 2: expected the columns snr_db, flops.*snr_db, speed"),
        ("snr_db,flops,flops\n1,2,3\n", "line 1: .*each once"),
        ("snr_db,flops\n1,2,3\n", "line 2: expected 2 values, got 3"),
        ("snr_db,flops\n1,2\n\nfast,-2\n", r"line 4: snr_db .*'fast'; line 4: flops must be > 0"),
        ("snr_db,flops\n1,\n", "line 2: flops must be a finite number, got ''"),
        ("snr_db,flops\nnan,1\n", "line 2: snr_db must be a finite number"),
        ("snr_db,flops,distance_m\n1,1,0\n", "line 2: distance_m must be > 0"),
    ],
)
def test_csv_errors_name_the_line(tmp_path, text, message):
    path = tmp_path / "devices.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        devices_from_csv(path)
