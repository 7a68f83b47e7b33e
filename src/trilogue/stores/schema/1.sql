-- What a trilogue file holds. Times are microseconds: wall clock where the name ends in _us, the machine's own
-- monotonic clock in `lease_us` (a wall clock that is set back must not end or prolong a lease).

-- Type names, sources and schema versions repeat on every record: stored once, named by number.
create table trilogue_types (
  id             integer primary key,
  name           text not null,
  source         text not null,
  schema_version integer not null,
  counted        integer not null default 0,   -- records of this type up to trilogue_progress.placed
  unique (name, source, schema_version)
);

-- The log. `position` is given out under the write lock and the newest record is never removed, so no number comes twice
-- and none at or below the largest can appear later.
create table trilogue_records (
  position    integer primary key,
  slot        integer not null,                -- hash of the key, or any
  type        integer not null,
  id          text not null,
  key         text,
  time_us     integer not null,
  recorded_us integer not null,
  stream      text,
  version     integer,
  correlation text,
  causation   text,
  more        blob,                            -- subject, traceparent, extensions as JSON; mostly null
  data        blob not null
);
create unique index trilogue_records_id on trilogue_records (id);
create unique index trilogue_records_stream on trilogue_records (stream, version) where stream is not null;

create table trilogue_groups (
  id          integer primary key autoincrement,  -- never given to another group: settlements are fenced by it
  name        text not null unique,
  app         text not null,                   -- the program whose handler it is
  patterns    text not null,                   -- JSON list
  ordered     integer not null,
  has_effects integer not null,
  paused      integer not null default 0,
  epoch       integer not null default 0,      -- grows when any slot changes hands: the cheap half of the fence
  revision    integer not null default 0,      -- grows when workers must look again: redrive, seek, pause, membership
  bound_us    integer not null
);

-- A group's progress. Below the cursor and without a held row = done.
create table trilogue_slots (
  group_id integer not null,
  slot     integer not null,
  cursor   integer not null,
  epoch    integer not null default 0,         -- the fence: settlements of an older epoch are refused
  owner    text,
  quiet_to integer not null default 0,         -- records up to here are a replay whose emits stay off
  done     integer not null default 0,
  failed   integer not null default 0,
  primary key (group_id, slot)
) without rowid;

-- Who works for a group. A member whose lease has passed, or whose process is gone, has lost its slots.
create table trilogue_members (
  group_id  integer not null,
  worker    text not null,
  machine   text not null,
  pid       integer not null,
  lease_us  integer not null,
  in_flight integer not null default 0,
  rate      real not null default 0,
  primary key (group_id, worker)
) without rowid;

-- The exceptions to the cursor. state: 0 ready (from due_us on), 1 parked, 2 dead.
create table trilogue_held (
  group_id  integer not null,
  position  integer not null,
  slot      integer not null,
  key       text,                              -- null where order does not matter
  state     integer not null,
  due_us    integer not null default 0,
  attempt   integer not null default 1,        -- the next attempt; of the dead, the last one
  failed_us integer,
  error     text,
  traceback text,
  primary key (group_id, position)
) without rowid;
create index trilogue_held_key on trilogue_held (group_id, slot, key, position) where state < 2;
create index trilogue_held_dead on trilogue_held (group_id, position) where state > 0;

-- Envelopes that enter the log when due.
create table trilogue_timers (
  id       text primary key,
  due_us   integer not null,
  envelope blob not null
) without rowid;
create index trilogue_timers_due on trilogue_timers (due_us);

-- Where the records of a slot are, for the history of a key. Written some thousand records at a time and not with each
-- append: 64 slots are 64 pages, and an fsync per publish would write them all. Newer records are found without it.
create table trilogue_places (
  slot     integer not null,
  position integer not null,
  primary key (slot, position)
) without rowid;

-- One row: how far places are noted and types counted.
create table trilogue_progress (placed integer not null);
insert into trilogue_progress values (0);
