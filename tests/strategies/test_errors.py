import pytest

from strategies.errors import cause

ACTOR = "\x1b[36mray::ClientAppActor.run()\x1b[39m (pid=1, ip=10.0.0.1, actor_id=0a, repr=<x>)"
FRAMES = '  File "/app/train.py", line 3, in run\n    ~~^^^\n' * 20
LINK = "\n\nThe above exception was the direct cause of the following exception:\n\n"
DURING = "\n\nDuring handling of the above exception, another exception occurred:\n\n"


def ray(*raised, link=LINK):
    blocks = link.join(f"{ACTOR}\n{FRAMES}{line}" for line in raised)
    return f"<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'{blocks}'>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            ray(
                "IndexError: index out of range in self",
                "flwr.clientapp.client_app.ClientAppException: \n"
                "Exception ClientAppException occurred. Message: index out of range in self",
            ),
            "IndexError: index out of range in self",
        ),
        (
            ray(
                "KeyError: 'k'",
                "ValueError: rows.csv, line 7: two lines\n  of 'text'",
                "ClientAppException: \nException ClientAppException occurred. Message: two",
            ),
            "ValueError: rows.csv, line 7: two lines\n  of 'text'",
        ),
        (
            ray("KeyError: 1", "torch.OutOfMemoryError: full", link=DURING),
            "torch.OutOfMemoryError: full",
        ),
        ("<class 'ZeroDivisionError'>:<'division by zero'>", "ZeroDivisionError: division by zero"),
        ("<class 'safetensors.SafetensorError'>:<'cut'>", "SafetensorError: cut"),
        ("Traceback (most recent call last):\n" + FRAMES + "OSError: gone", "OSError: gone"),
        ("the node is away", "the node is away"),
        ("", ""),
    ],
)
def test_the_exception_is_found_in_what_is_wrapped_around_it(text, expected):
    assert cause(text) == expected
