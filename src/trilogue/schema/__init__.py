"""What events look like: now, in every released version, and in what a log holds.

    classes of the app ──known──▶ Coder by type ──form_of──▶ {"version": 2, "key": "customer", …, "schema": {JSON Schema}}
                                                                  │ changes
    schemas.lock.json (committed: every version ever released) ───┘──▶ Change: breaking or not, and how to mend it
    a real log: records, dead letters, timers ──read_stored──▶ which of it this code cannot read

One version means one form: whoever knows version 2 can read what anybody wrote as version 2. So a version may gain optional
fields and nothing else; every other change is a new version with upcast= from the one before.
"""
