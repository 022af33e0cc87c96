"""Jobs on a cluster: what supervises one, what starts its processes on each node, and what says whether it runs again.

Nothing here loads torch: it stands beside a job for days, on the nodes that the job needs.
"""
