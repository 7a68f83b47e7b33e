-- What the event store side adds.

-- Small states that somebody keeps: of processes, snapshots, stored answers, streams that are closed or truncated,
-- builds of projections. `owner` says whose.
create table trilogue_state (
  owner text not null,
  id    text not null,
  at_us integer not null,
  body  blob not null,
  primary key (owner, id)
) without rowid;
create index trilogue_state_age on trilogue_state (owner, at_us);

-- Where the records of a tag are. Written with each append, because a decision is refused by what it finds here.
create table trilogue_tags (
  tag      text not null,
  position integer not null,
  primary key (tag, position)
) without rowid;

-- Where the records of a correlation are; noted late, like trilogue_places.
create table trilogue_traces (
  correlation text not null,
  position    integer not null,
  primary key (correlation, position)
) without rowid;
insert into trilogue_traces
  select correlation, position from trilogue_records
  where correlation is not null and position <= (select placed from trilogue_progress);

-- A timer with a name can be moved and cancelled by it.
alter table trilogue_timers add column name text;
create unique index trilogue_timers_name on trilogue_timers (name) where name is not null;
