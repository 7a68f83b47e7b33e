-- What a broker beside the store adds. Its log stays where it is; only what did not go well comes here.

-- The position last given to a held record of a broker's group; null for a group that reads this file's log. Positions of
-- such a group are its own: they count what came here, whatever the broker calls its places.
alter table trilogue_groups add column inbox integer;

-- The record itself (MessagePack), because it is on no log of this file; null where it is.
alter table trilogue_held add column record blob;

-- A broker delivers again what was held and not yet acknowledged: then the row that is there is the one.
alter table trilogue_held add column record_id text;
create unique index trilogue_held_record on trilogue_held (group_id, record_id) where record_id is not null;
