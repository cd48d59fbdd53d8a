"""The URLs of a platform without sockets."""

from worker.queue.platform import Urls

URLS = Urls("take?", "take-batch?", "stop?", "stream/$ID?", "done/$ID?")
