mod adapters;
mod behaviour;
mod gpus;
mod scale;
mod schedules;
mod sleep;
mod world;
