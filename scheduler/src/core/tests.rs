mod adapters;
mod behaviour;
mod gpus;
mod pairs;
mod scale;
mod schedules;
mod sleep;
mod world;
