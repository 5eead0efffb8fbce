mod behaviour;
mod schedules;
mod world;
