"""When the frames of a video are shown, from time stamps that may be missing, out of order, or begin anew."""

from collections.abc import Sequence

import numpy as np

JUMP_SECONDS = 10.0
JUMP_STEPS = 100.0
"""A step between two frames larger than both, backwards or forwards, is a cut between two recordings, whose clocks
have nothing to do with each other. (Smaller steps back are stamps out of order; smaller ones ahead are pauses.)"""


def in_order(stamps: Sequence[float | None], step: float, any_order: bool) -> tuple[list[float], list[int]]:
    """Times that never decrease, and which frame is shown at each.

    Args:
        stamps: seconds, one for each frame in the order the decoder gives them, None where the file has none.
        step: frames per second by the file's own word, for gaps.
        any_order: the frames stand alone (every one is a key frame), so that stamps out of order may mean that frames
            are stored out of order. A decoder that predicts frames from each other gives them in the right one.

    Returns:
        Times [t] in seconds, and the number in decoding order of the frame shown at each.
    """
    if not stamps:
        return [], []
    usual = 1 / step
    times = np.empty(len(stamps))
    shift = 0.0
    latest = 0.0  # the time of the newest frame so far
    for index, stamp in enumerate(stamps):
        time = latest + usual * bool(index) if stamp is None else stamp + shift
        jump = time - latest
        if index and stamp is not None and (abs(jump) > max(JUMP_SECONDS, JUMP_STEPS * usual)):
            shift += latest + usual - time
            time = latest + usual
        times[index] = time
        latest = max(latest, time) if index else time
    order = np.argsort(times, kind="stable") if any_order else np.arange(len(times))
    times = np.sort(times)
    if len(times) > 1 and times[-1] == times[0]:  # stamps that say nothing
        times = times[0] + usual * np.arange(len(times))
    return times.tolist(), order.tolist()
