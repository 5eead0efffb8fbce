mod behaviour;
mod gpus;
mod schedules;
mod world;
