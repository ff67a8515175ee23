"""Finished runs, made once for all tests of what is done with them."""

import pytest


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Return a function that returns the folder of a finished run of a kind."""
    from tests.app.trained import finished

    made = {}

    def get(kind):
        if kind not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("fedlora_app.report.folder.plot_run", lambda *_: [])
                made[kind] = finished(tmp_path_factory.mktemp("run"), kind)
        return made[kind]

    return get
