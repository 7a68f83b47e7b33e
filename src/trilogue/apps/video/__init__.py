"""A video platform: one watch reaches six services, each with its own pace, failures and tables.

    video.py ──> video.watch_started ──> user · recommendation · analytics · notification · badge · ranking

Each service is one file to copy. `trilogue demo video` feeds them a watch log, `trilogue demo queue` three watches.
`trilogue demo stream` is the platform while people watch: heartbeats, qualities, profiles (stream_*.py, personalization.py).
"""

from trilogue.apps.video.demo import demo_video
from trilogue.apps.video.options import VideoOptions
from trilogue.apps.video.queue_demo import demo_queue
from trilogue.apps.video.stream_demo import demo_stream

__all__ = ["VideoOptions", "demo_queue", "demo_stream", "demo_video"]
