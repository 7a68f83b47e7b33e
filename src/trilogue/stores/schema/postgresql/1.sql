-- What a trilogue schema holds on PostgreSQL; ../1.sql to ../3.sql say why each table and column is there. Texts are compared byte
-- by byte (collate "C"), as on SQLite. Times are microseconds: wall clock where the name ends in _us, the server's clock in
-- lease_us.

create table trilogue_meta (version integer not null);
insert into trilogue_meta values (1);

-- The newest position. Whoever appends locks this row until the commit, so positions become visible in their order: nobody who
-- reads up to the newest one passes over a commit that comes late. fillfactor: every commit changes it, in its page.
create table trilogue_head (head bigint not null, recorded_us bigint not null) with (fillfactor = 10);
insert into trilogue_head values (0, 0);

create table trilogue_types (
  id             integer primary key,
  name           text collate "C" not null,
  source         text collate "C" not null,
  schema_version integer not null,
  counted        bigint not null default 0,
  unique (name, source, schema_version)
);

create table trilogue_records (
  position    bigint primary key,
  slot        smallint not null,
  type        integer not null,
  id          text collate "C" not null,
  key         text collate "C",
  time_us     bigint not null,
  recorded_us bigint not null,
  stream      text collate "C",
  version     bigint,
  correlation text collate "C",
  causation   text collate "C",
  more        bytea,
  data        bytea not null
) with (autovacuum_vacuum_insert_scale_factor = 0.05);
create unique index trilogue_records_id on trilogue_records (id);
create unique index trilogue_records_stream on trilogue_records (stream, version) where stream is not null;

create table trilogue_groups (
  id          bigint generated always as identity primary key,
  name        text collate "C" not null unique,
  app         text collate "C" not null,
  patterns    text not null,
  ordered     boolean not null,
  has_effects boolean not null,
  paused      boolean not null default false,
  epoch       bigint not null default 0,
  revision    bigint not null default 0,
  bound_us    bigint not null,
  inbox       bigint
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 500);

create table trilogue_slots (
  group_id bigint not null,
  slot     integer not null,
  cursor   bigint not null,
  epoch    bigint not null default 0,
  owner    text collate "C",
  quiet_to bigint not null default 0,
  done     bigint not null default 0,
  failed   bigint not null default 0,
  primary key (group_id, slot)
) with (fillfactor = 20, autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 1000);

create table trilogue_members (
  group_id  bigint not null,
  worker    text collate "C" not null,
  machine   text not null,
  pid       bigint not null,
  lease_us  bigint not null,
  in_flight bigint not null default 0,
  rate      double precision not null default 0,
  primary key (group_id, worker)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 500);

create table trilogue_held (
  group_id  bigint not null,
  position  bigint not null,
  slot      integer not null,
  key       text collate "C",
  state     smallint not null,
  due_us    bigint not null default 0,
  attempt   integer not null default 1,
  failed_us bigint,
  error     text,
  traceback text,
  record    bytea,
  record_id text collate "C",
  primary key (group_id, position)
) with (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
create index trilogue_held_key on trilogue_held (group_id, slot, key, position) where state < 2;
create index trilogue_held_dead on trilogue_held (group_id, position) where state > 0;
create unique index trilogue_held_record on trilogue_held (group_id, record_id) where record_id is not null;

create table trilogue_timers (
  id       text collate "C" primary key,
  due_us   bigint not null,
  envelope bytea not null,
  name     text collate "C",
  seq      bigint generated always as identity   -- of those due at the same moment the first one set fires first
) with (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
create index trilogue_timers_due on trilogue_timers (due_us, seq);
create unique index trilogue_timers_name on trilogue_timers (name) where name is not null;

create table trilogue_places (slot smallint not null, position bigint not null, primary key (slot, position));
create table trilogue_traces (correlation text collate "C" not null, position bigint not null, primary key (correlation, position));
create table trilogue_tags (tag text collate "C" not null, position bigint not null, primary key (tag, position));

create table trilogue_progress (placed bigint not null);
insert into trilogue_progress values (0);

create table trilogue_state (
  owner text collate "C" not null,
  id    text collate "C" not null,
  at_us bigint not null,
  body  bytea not null,
  primary key (owner, id)
) with (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
create index trilogue_state_age on trilogue_state (owner, at_us);

-- Append records in one call: the versions and positions are given here, under the lock of trilogue_head, which is taken as late as
-- possible and let go with the commit. One element of the first nine arrays per record; one of sizes, streams, expected per append
-- (its records follow each other). expected -1: whatever version it is. tagged: the number of a tag's record, from 1.
--
--   {0, head}        stored: positions are head + 1, head + 2, …
--   {1, n, m, …}     nothing stored: the appends n, m, … (from 1) do not fit their streams
--   {2}              nothing stored: an id is there already; with `skip` such records are left out instead
create function trilogue_append(
  types integer[], ids text[], keys text[], slots smallint[], times bigint[], correlations text[], causations text[], mores bytea[],
  bodies bytea[], sizes integer[], streams text[], expected bigint[], tagged integer[], tags text[], skip boolean
) returns bigint[] language plpgsql set search_path from current
  set plan_cache_mode = force_generic_plan set jit = off  -- planning it for these very arrays costs more than it saves
as $$
declare
  first bigint; at_us bigint; wanted integer := cardinality(ids); stored integer; unfit bigint[]; before bigint; closed boolean;
begin
  select head, recorded_us into strict first, at_us from trilogue_head for update;
  at_us := greatest(at_us, (extract(epoch from clock_timestamp()) * 1000000)::bigint);
  if cardinality(streams) = 0 then
    insert into trilogue_records
      select first + n, coalesce(u.slot, ((first + n) % 64)::smallint), u.type, u.id, u.key, u.time_us, at_us, null, null,
             u.correlation, u.causation, u.more, u.data
      from unnest(types, ids, keys, slots, times, correlations, causations, mores, bodies) with ordinality
        as u (type, id, key, slot, time_us, correlation, causation, more, data, n)
      on conflict (id) do nothing;
  elsif cardinality(streams) = 1 then
    before := coalesce((select version from trilogue_records where stream = streams[1] order by version desc limit 1), 0);
    closed := (select convert_from(body, 'UTF8')::jsonb ->> 'closed' from trilogue_state where owner = 'stream' and id = streams[1])
              is not null;
    if closed or expected[1] not in (-1, before) then
      return '{1, 1}';
    end if;
    insert into trilogue_records
      select first + n, coalesce(u.slot, ((first + n) % 64)::smallint), u.type, u.id, u.key, u.time_us, at_us, streams[1],
             before + n, u.correlation, u.causation, u.more, u.data
      from unnest(types, ids, keys, slots, times, correlations, causations, mores, bodies) with ordinality
        as u (type, id, key, slot, time_us, correlation, causation, more, data, n)
      on conflict (id) do nothing;
  else
    with a as (
      select n, s.stream, s.expected, s.size,
             coalesce(sum(s.size) over (partition by s.stream order by n rows between unbounded preceding and 1 preceding), 0) as before
      from unnest(streams, expected, sizes) with ordinality as s (stream, expected, size, n) where s.stream is not null
    ), v as (
      select d.stream, coalesce((select max(r.version) from trilogue_records r where r.stream = d.stream), 0) as version,
             exists (select 1 from trilogue_state c where c.owner = 'stream' and c.id = d.stream
                     and convert_from(c.body, 'UTF8')::jsonb ->> 'closed' is not null) as closed
      from (select distinct stream from a) d
    ), judged as (
      select a.n, bool_or(v.closed or (a.expected <> -1 and a.expected <> v.version + a.before))
                    over (partition by a.stream order by a.n) as unfit
      from a join v on v.stream = a.stream
    )
    select array_agg(n order by n) into unfit from judged where judged.unfit;
    if unfit is not null then
      return 1::bigint || unfit;
    end if;
    with a as (
      select n, s.stream, s.size, sum(s.size) over (order by n) - s.size as skipped,
             coalesce(sum(s.size) over (partition by s.stream order by n rows between unbounded preceding and 1 preceding), 0) as before
      from unnest(streams, sizes) with ordinality as s (stream, size, n)
    ), b as (
      select a.*, (select coalesce(max(r.version), 0) from trilogue_records r where r.stream = a.stream) as version
      from a
    ), records as (
      select b.stream, b.version + b.before + i as version, b.skipped + i as n from b, generate_series(1, b.size) i
    )
    insert into trilogue_records
      select first + u.n, coalesce(u.slot, ((first + u.n) % 64)::smallint), u.type, u.id, u.key, u.time_us, at_us, r.stream,
             case when r.stream is not null then r.version end, u.correlation, u.causation, u.more, u.data
      from unnest(types, ids, keys, slots, times, correlations, causations, mores, bodies) with ordinality
        as u (type, id, key, slot, time_us, correlation, causation, more, data, n)
        join records r on r.n = u.n
      on conflict (id) do nothing;
  end if;
  get diagnostics stored = row_count;
  if stored < wanted then
    delete from trilogue_records where position > first;
    if not skip then
      return '{2}';
    end if;
    insert into trilogue_records
      select first + row_number() over (order by f.n),
             coalesce(f.slot, ((first + row_number() over (order by f.n)) % 64)::smallint),
             f.type, f.id, f.key, f.time_us, at_us, null, null, f.correlation, f.causation, f.more, f.data
      from (
        select distinct on (u.id) u.*
        from unnest(types, ids, keys, slots, times, correlations, causations, mores, bodies) with ordinality
          as u (type, id, key, slot, time_us, correlation, causation, more, data, n)
        where not exists (select 1 from trilogue_records r where r.id = u.id)
        order by u.id, u.n
      ) f;
    get diagnostics stored = row_count;
  end if;
  if cardinality(tags) > 0 then
    insert into trilogue_tags
      select t.tag, r.position from unnest(tagged, tags) as t (n, tag) join trilogue_records r on r.id = ids[t.n]
      on conflict (tag, position) do nothing;
  end if;
  if stored > 0 then
    update trilogue_head set head = first + stored, recorded_us = at_us;
  end if;
  return array[0, first];
end $$;
