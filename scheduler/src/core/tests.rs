mod adapters;
mod behaviour;
mod gpus;
mod scale;
mod schedules;
mod siblings;
mod sleep;
mod world;
