-- A log as trilogue 0.1.0 left it, word for word: two schema versions of shop.order.placed, published and in a stream,
-- dead, parked and waiting records of three groups, two timers. Never to be changed: it is what programs out there hold.
pragma application_id = 1953655148;
pragma user_version = 1;
pragma journal_mode = wal;
begin;
CREATE TABLE trilogue_groups (
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
CREATE TABLE trilogue_held (
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
CREATE TABLE trilogue_members (
  group_id  integer not null,
  worker    text not null,
  machine   text not null,
  pid       integer not null,
  lease_us  integer not null,
  in_flight integer not null default 0,
  rate      real not null default 0,
  primary key (group_id, worker)
) without rowid;
CREATE TABLE trilogue_places (
  slot     integer not null,
  position integer not null,
  primary key (slot, position)
) without rowid;
CREATE TABLE trilogue_progress (placed integer not null);
CREATE TABLE trilogue_records (
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
CREATE TABLE trilogue_slots (
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
CREATE TABLE trilogue_timers (
  id       text primary key,
  due_us   integer not null,
  envelope blob not null
) without rowid;
CREATE TABLE trilogue_types (
  id             integer primary key,
  name           text not null,
  source         text not null,
  schema_version integer not null,
  counted        integer not null default 0,   -- records of this type up to trilogue_progress.placed
  unique (name, source, schema_version)
);
CREATE INDEX trilogue_held_dead on trilogue_held (group_id, position) where state > 0;
CREATE INDEX trilogue_held_key on trilogue_held (group_id, slot, key, position) where state < 2;
CREATE UNIQUE INDEX trilogue_records_id on trilogue_records (id);
CREATE UNIQUE INDEX trilogue_records_stream on trilogue_records (stream, version) where stream is not null;
CREATE INDEX trilogue_timers_due on trilogue_timers (due_us);
insert into trilogue_groups values
  (1,'skipping','shop','["shop.order.placed"]',1,0,0,1,2,1795371187490425),
  (2,'parking','shop','["shop.order.placed"]',1,0,0,1,2,1795371187490425),
  (3,'retrying','shop','["shop.order.placed"]',1,0,0,1,2,1795371187490425);
insert into trilogue_held values
  (1,1,33,'c1',2,0,1,1795371187505324,'ValueError: no printer',null),
  (1,3,27,'c2',2,0,1,1795371187508241,'ValueError: no printer',null),
  (1,4,13,'c3',2,0,1,1795371187511299,'ValueError: no printer',null),
  (2,1,33,'c1',1,0,1,1795371187505565,'ValueError: no printer',null),
  (2,3,27,'c2',1,0,1,1795371187508315,'ValueError: no printer',null),
  (2,4,13,'c3',1,0,1,1795371187511440,'ValueError: no printer',null),
  (3,1,33,'c1',0,1795371188471580,2,1795371187505615,'ValueError: no printer',null),
  (3,3,27,'c2',0,1795371188103033,2,1795371187508359,'ValueError: no printer',null),
  (3,4,13,'c3',0,1795371188111714,2,1795371187511579,'ValueError: no printer',null);
insert into trilogue_progress values
  (0);
insert into trilogue_records values
  (1,33,1,'shop-1','c1',1767225601000000,1795371187499291,null,null,null,null,null,cast('{"order":"o1","customer":"c1","amount":"9.90"}' as blob)),
  (2,33,2,'shop-2','c1',1767225602000000,1795371187502322,null,null,null,null,null,cast('{"order":"o1","customer":"c1"}' as blob)),
  (3,27,1,'shop-3','c2',1767225603000000,1795371187505652,null,null,null,null,null,cast('{"order":"o2","customer":"c2","amount":"5"}' as blob)),
  (4,13,1,'shop-4','c3',1767225604000000,1795371187508110,'order-o3',1,null,null,null,cast('{"order":"o3","customer":"c3","amount":"1.50"}' as blob)),
  (5,46,3,'shop-5','c4',1767225605000000,1795371187543780,null,null,null,null,null,cast('{"order":"o4","customer":"c4","total":"7","note":"gift"}' as blob)),
  (6,33,3,'shop-6','c1',1767225606000000,1795371187545454,null,null,null,null,null,cast('{"order":"o5","customer":"c1","total":"8","note":""}' as blob)),
  (7,13,3,'shop-7','c3',1767225607000000,1795371187546104,'order-o3',2,null,null,null,cast('{"order":"o3","customer":"c3","total":"2.50","note":""}' as blob)),
  (8,13,2,'shop-8','c3',1767225608000000,1795371187546104,'order-o3',3,null,null,null,cast('{"order":"o3","customer":"c3"}' as blob));
insert into trilogue_slots values
  (1,0,4,1,null,0,0,0), (1,1,4,1,null,0,0,0), (1,2,4,1,null,0,0,0), (1,3,4,1,null,0,0,0), (1,4,4,1,null,0,0,0),
  (1,5,4,1,null,0,0,0), (1,6,4,1,null,0,0,0), (1,7,4,1,null,0,0,0), (1,8,4,1,null,0,0,0), (1,9,4,1,null,0,0,0),
  (1,10,4,1,null,0,0,0), (1,11,4,1,null,0,0,0), (1,12,4,1,null,0,0,0), (1,13,4,1,null,0,0,1), (1,14,4,1,null,0,0,0),
  (1,15,4,1,null,0,0,0), (1,16,4,1,null,0,0,0), (1,17,4,1,null,0,0,0), (1,18,4,1,null,0,0,0), (1,19,4,1,null,0,0,0),
  (1,20,4,1,null,0,0,0), (1,21,4,1,null,0,0,0), (1,22,4,1,null,0,0,0), (1,23,4,1,null,0,0,0), (1,24,4,1,null,0,0,0),
  (1,25,4,1,null,0,0,0), (1,26,4,1,null,0,0,0), (1,27,4,1,null,0,0,1), (1,28,4,1,null,0,0,0), (1,29,4,1,null,0,0,0),
  (1,30,4,1,null,0,0,0), (1,31,4,1,null,0,0,0), (1,32,4,1,null,0,0,0), (1,33,4,1,null,0,0,1), (1,34,4,1,null,0,0,0),
  (1,35,4,1,null,0,0,0), (1,36,4,1,null,0,0,0), (1,37,4,1,null,0,0,0), (1,38,4,1,null,0,0,0), (1,39,4,1,null,0,0,0),
  (1,40,4,1,null,0,0,0), (1,41,4,1,null,0,0,0), (1,42,4,1,null,0,0,0), (1,43,4,1,null,0,0,0), (1,44,4,1,null,0,0,0),
  (1,45,4,1,null,0,0,0), (1,46,4,1,null,0,0,0), (1,47,4,1,null,0,0,0), (1,48,4,1,null,0,0,0), (1,49,4,1,null,0,0,0),
  (1,50,4,1,null,0,0,0), (1,51,4,1,null,0,0,0), (1,52,4,1,null,0,0,0), (1,53,4,1,null,0,0,0), (1,54,4,1,null,0,0,0),
  (1,55,4,1,null,0,0,0), (1,56,4,1,null,0,0,0), (1,57,4,1,null,0,0,0), (1,58,4,1,null,0,0,0), (1,59,4,1,null,0,0,0),
  (1,60,4,1,null,0,0,0), (1,61,4,1,null,0,0,0), (1,62,4,1,null,0,0,0), (1,63,4,1,null,0,0,0), (2,0,4,1,null,0,0,0),
  (2,1,4,1,null,0,0,0), (2,2,4,1,null,0,0,0), (2,3,4,1,null,0,0,0), (2,4,4,1,null,0,0,0), (2,5,4,1,null,0,0,0),
  (2,6,4,1,null,0,0,0), (2,7,4,1,null,0,0,0), (2,8,4,1,null,0,0,0), (2,9,4,1,null,0,0,0), (2,10,4,1,null,0,0,0),
  (2,11,4,1,null,0,0,0), (2,12,4,1,null,0,0,0), (2,13,4,1,null,0,0,1), (2,14,4,1,null,0,0,0), (2,15,4,1,null,0,0,0),
  (2,16,4,1,null,0,0,0), (2,17,4,1,null,0,0,0), (2,18,4,1,null,0,0,0), (2,19,4,1,null,0,0,0), (2,20,4,1,null,0,0,0),
  (2,21,4,1,null,0,0,0), (2,22,4,1,null,0,0,0), (2,23,4,1,null,0,0,0), (2,24,4,1,null,0,0,0), (2,25,4,1,null,0,0,0),
  (2,26,4,1,null,0,0,0), (2,27,4,1,null,0,0,1), (2,28,4,1,null,0,0,0), (2,29,4,1,null,0,0,0), (2,30,4,1,null,0,0,0),
  (2,31,4,1,null,0,0,0), (2,32,4,1,null,0,0,0), (2,33,4,1,null,0,0,1), (2,34,4,1,null,0,0,0), (2,35,4,1,null,0,0,0),
  (2,36,4,1,null,0,0,0), (2,37,4,1,null,0,0,0), (2,38,4,1,null,0,0,0), (2,39,4,1,null,0,0,0), (2,40,4,1,null,0,0,0),
  (2,41,4,1,null,0,0,0), (2,42,4,1,null,0,0,0), (2,43,4,1,null,0,0,0), (2,44,4,1,null,0,0,0), (2,45,4,1,null,0,0,0),
  (2,46,4,1,null,0,0,0), (2,47,4,1,null,0,0,0), (2,48,4,1,null,0,0,0), (2,49,4,1,null,0,0,0), (2,50,4,1,null,0,0,0),
  (2,51,4,1,null,0,0,0), (2,52,4,1,null,0,0,0), (2,53,4,1,null,0,0,0), (2,54,4,1,null,0,0,0), (2,55,4,1,null,0,0,0),
  (2,56,4,1,null,0,0,0), (2,57,4,1,null,0,0,0), (2,58,4,1,null,0,0,0), (2,59,4,1,null,0,0,0), (2,60,4,1,null,0,0,0),
  (2,61,4,1,null,0,0,0), (2,62,4,1,null,0,0,0), (2,63,4,1,null,0,0,0), (3,0,4,1,null,0,0,0), (3,1,4,1,null,0,0,0),
  (3,2,4,1,null,0,0,0), (3,3,4,1,null,0,0,0), (3,4,4,1,null,0,0,0), (3,5,4,1,null,0,0,0), (3,6,4,1,null,0,0,0),
  (3,7,4,1,null,0,0,0), (3,8,4,1,null,0,0,0), (3,9,4,1,null,0,0,0), (3,10,4,1,null,0,0,0), (3,11,4,1,null,0,0,0),
  (3,12,4,1,null,0,0,0), (3,13,4,1,null,0,0,1), (3,14,4,1,null,0,0,0), (3,15,4,1,null,0,0,0), (3,16,4,1,null,0,0,0),
  (3,17,4,1,null,0,0,0), (3,18,4,1,null,0,0,0), (3,19,4,1,null,0,0,0), (3,20,4,1,null,0,0,0), (3,21,4,1,null,0,0,0),
  (3,22,4,1,null,0,0,0), (3,23,4,1,null,0,0,0), (3,24,4,1,null,0,0,0), (3,25,4,1,null,0,0,0), (3,26,4,1,null,0,0,0),
  (3,27,4,1,null,0,0,1), (3,28,4,1,null,0,0,0), (3,29,4,1,null,0,0,0), (3,30,4,1,null,0,0,0), (3,31,4,1,null,0,0,0),
  (3,32,4,1,null,0,0,0), (3,33,4,1,null,0,0,1), (3,34,4,1,null,0,0,0), (3,35,4,1,null,0,0,0), (3,36,4,1,null,0,0,0),
  (3,37,4,1,null,0,0,0), (3,38,4,1,null,0,0,0), (3,39,4,1,null,0,0,0), (3,40,4,1,null,0,0,0), (3,41,4,1,null,0,0,0),
  (3,42,4,1,null,0,0,0), (3,43,4,1,null,0,0,0), (3,44,4,1,null,0,0,0), (3,45,4,1,null,0,0,0), (3,46,4,1,null,0,0,0),
  (3,47,4,1,null,0,0,0), (3,48,4,1,null,0,0,0), (3,49,4,1,null,0,0,0), (3,50,4,1,null,0,0,0), (3,51,4,1,null,0,0,0),
  (3,52,4,1,null,0,0,0), (3,53,4,1,null,0,0,0), (3,54,4,1,null,0,0,0), (3,55,4,1,null,0,0,0), (3,56,4,1,null,0,0,0),
  (3,57,4,1,null,0,0,0), (3,58,4,1,null,0,0,0), (3,59,4,1,null,0,0,0), (3,60,4,1,null,0,0,0), (3,61,4,1,null,0,0,0),
  (3,62,4,1,null,0,0,0), (3,63,4,1,null,0,0,0);
insert into trilogue_timers values
  ('shop-10',1767225600000000,cast('{"id":"shop-10","type":"shop.order.placed","data":"eyJvcmRlciI6Im83IiwiY3VzdG9tZXIiOiJjNyIsInRvdGFsIjoiNCIsIm5vdGUiOiIifQ==","key":"c7","source":"shop","time_us":1767225610000000,"schema_version":2,"correlation_id":null,"causation_id":null,"subject":null,"traceparent":null,"extensions":null}' as blob)),
  ('shop-9',1767225600000000,cast('{"id":"shop-9","type":"shop.order.placed","data":"eyJvcmRlciI6Im82IiwiY3VzdG9tZXIiOiJjNiIsImFtb3VudCI6IjMifQ==","key":"c6","source":"shop","time_us":1767225609000000,"schema_version":1,"correlation_id":null,"causation_id":null,"subject":null,"traceparent":null,"extensions":null}' as blob));
insert into trilogue_types values
  (1,'shop.order.placed','shop',1,0), (2,'shop.order.shipped','shop',1,0), (3,'shop.order.placed','shop',2,0);
commit;
