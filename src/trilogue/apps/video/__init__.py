"""A video platform: one watch reaches six services, each with its own pace, failures and tables.

    video.py ──> video.watch_started ──> user · recommendation · analytics · notification · badge · ranking

Each service is one file to copy. `trilogue demo video` feeds them a watch log, `trilogue demo queue` three watches.
"""

from trilogue.apps.video.demo import demo_video
from trilogue.apps.video.options import VideoOptions
from trilogue.apps.video.queue_demo import demo_queue

__all__ = ["VideoOptions", "demo_queue", "demo_video"]
