"""Metrics of the other machines of a cluster."""

from collections.abc import Callable, Iterator

from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector

from worker.errors import Json


class ClusterCollector(Collector):
    """Metrics of the nodes that `describe` returns, read at every scrape; none on a single machine."""

    def __init__(self, describe: Callable[[], Json]) -> None:
        self._describe = describe

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the number of nodes, and for how long each has been silent."""
        cluster = self._describe()
        if not cluster:
            return
        yield GaugeMetricFamily("worker_cluster_nodes", "Nodes that have joined.", value=len(cluster["nodes"]))
        silence = GaugeMetricFamily("worker_cluster_silence_seconds", "Time since a node was heard.", labels=["rank"])
        for node in cluster["nodes"]:
            silence.add_metric([str(node["rank"])], node["heard_seconds"])
        yield silence
