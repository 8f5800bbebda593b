"""Batch jobs measured: `python -m benchmarks.batch.long | throughput | pairs | bad_rows`."""
