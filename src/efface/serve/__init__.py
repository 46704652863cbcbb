"""An images API in which each key carries a policy that its holder cannot weaken. See docs/serve.md.

It needs `pip install "efface[serve]"`, and nothing else of Efface imports it. A request becomes a committed job; a
worker claims whole batches of jobs, draws them under a guard, and finishes each job once.
"""
