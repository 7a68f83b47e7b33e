"""The command line: `trilogue run | demo | publish | tail | status | dead | replay | groups`.

main ──> run, act, show, demo ──> log (which log, which group) ──> the Store port
                              └─> output (text made safe, tables, JSON, progress)
"""
