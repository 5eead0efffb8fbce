//! The lists of workers that change while the gateway runs: one task follows each.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use forebay_backends::discovery::{Lister, Place, Source};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use url::Url;

use crate::config::{Config, Discover, Model, Name, Worker};

/// Lists that wait to be taken over.
const WAITING_MAX: usize = 64;

/// What a list says now.
pub(super) struct Listed {
    source: Source,
    places: Vec<Place>,
}

pub(super) struct Lists {
    tracker: TaskTracker,
    tell: mpsc::Sender<Listed>,
    followed: HashMap<Source, Followed>,
}

struct Followed {
    /// How often it is read.
    every: Duration,
    /// Empty until it was read.
    places: Vec<Place>,
    /// Ends its task.
    _guard: DropGuard,
}

impl Lists {
    pub(super) fn new(tracker: TaskTracker) -> (Self, mpsc::Receiver<Listed>) {
        let (tell, told) = mpsc::channel(WAITING_MAX);
        (Self { tracker, tell, followed: HashMap::new() }, told)
    }

    /// Follows the lists of `config` and no others. What one that stays has said is kept.
    pub(super) fn apply(&mut self, config: &Config) {
        // Of two that read one list, the one in more of a hurry.
        let mut wanted: HashMap<&Source, Duration> = HashMap::new();
        for Discover { source, every, .. } in config.models.iter().flat_map(|model| &model.discover) {
            wanted.entry(source).and_modify(|least| *least = (*least).min(*every)).or_insert(*every);
        }
        self.followed.retain(|source, _| wanted.contains_key(source));
        for (source, every) in wanted {
            let known = self.followed.remove(source);
            let followed = match known {
                Some(known) if known.every == every => known,
                known => {
                    let places = known.map(|known| known.places).unwrap_or_default();
                    Followed { every, places, _guard: self.follow(source.clone(), every) }
                }
            };
            self.followed.insert(source.clone(), followed);
        }
    }

    fn follow(&self, source: Source, every: Duration) -> DropGuard {
        let (over, tell) = (CancellationToken::new(), self.tell.clone());
        let guard = over.clone().drop_guard();
        self.tracker.spawn(over.run_until_cancelled_owned(async move {
            let mut lister = Lister::new(source.clone(), every);
            while tell.send(Listed { source: source.clone(), places: lister.next().await }).await.is_ok() {}
        }));
        guard
    }

    /// Takes over what a list says; false when nobody wants it any more.
    pub(super) fn learn(&mut self, listed: Listed) -> bool {
        let followed = self.followed.get_mut(&listed.source);
        followed.map(|followed| followed.places = listed.places).is_some()
    }

    /// Adds to each model the workers that are listed for it.
    pub(super) fn complete(&self, config: &mut Config, enlisted: &mut Enlisted) {
        for model in &mut config.models {
            for (worker, draining) in self.listed(model) {
                let name = worker.name.to_string();
                if enlisted.add(model, worker) && draining {
                    enlisted.draining.insert(name);
                }
            }
        }
    }

    /// Each with whether it drains.
    fn listed(&self, model: &Model) -> Vec<(Worker, bool)> {
        let lists = model.discover.iter().filter_map(|discover| Some((discover, self.followed.get(&discover.source)?)));
        lists
            .flat_map(|(discover, followed)| {
                followed.places.iter().filter_map(|place| Some((worker(discover, place)?, place.draining)))
            })
            .collect()
    }
}

/// Who serves already, so that no name and no address is given twice.
pub(super) struct Enlisted {
    /// Of workers and of their ranks.
    names: BTreeSet<String>,
    /// By model, with the model's name there.
    addresses: BTreeSet<(Name, Url, Option<Name>)>,
    /// The names of those that drain by their list's word.
    pub(super) draining: BTreeSet<String>,
}

/// Why somebody cannot be added.
pub(super) enum Clash {
    /// The model has a worker at this address that serves the same.
    Address,
    /// The name is taken.
    Name(String),
}

impl Enlisted {
    pub(super) fn of(config: &Config) -> Self {
        let mut enlisted = Self { names: BTreeSet::new(), addresses: BTreeSet::new(), draining: BTreeSet::new() };
        for model in &config.models {
            model.workers.iter().for_each(|worker| enlisted.note(&model.name, worker));
        }
        enlisted
    }

    fn note(&mut self, model: &Name, worker: &Worker) {
        self.names.extend(names(worker));
        self.addresses.insert((model.clone(), worker.url.clone(), worker.model.clone()));
    }

    pub(super) fn clash(&self, model: &Name, worker: &Worker) -> Option<Clash> {
        if self.addresses.contains(&(model.clone(), worker.url.clone(), worker.model.clone())) {
            return Some(Clash::Address);
        }
        names(worker).find(|name| self.names.contains(name)).map(Clash::Name)
    }

    /// Adds a worker to a model, or says why it is left out: what has one address is the same worker.
    pub(super) fn add(&mut self, model: &mut Model, worker: Worker) -> bool {
        let clash = self.clash(&model.name, &worker);
        match &clash {
            None => {
                self.note(&model.name, &worker);
                model.workers.push(worker);
            }
            Some(Clash::Address) => {}
            Some(Clash::Name(name)) => {
                tracing::warn!(name, worker = %worker.url, model = %model.name, "a worker is left out: its name is taken");
            }
        }
        clash.is_none()
    }
}

/// The names that a worker takes: its own and its ranks'.
fn names(worker: &Worker) -> impl Iterator<Item = String> + '_ {
    std::iter::once(worker.name.to_string())
        .chain(worker.ranks().filter(Option::is_some).map(|rank| worker.rank_name(rank)))
}

/// The worker at a place, as if it stood in the file; `None` where its names cannot stand in a header.
fn worker(discover: &Discover, place: &Place) -> Option<Worker> {
    let (host, port) = (place.url.host_str()?, place.url.port_or_known_default()?);
    let name = place.name.clone().unwrap_or_else(|| format!("{host}:{port}"));
    let model = place.model.as_deref().map(Name::new).transpose();
    let (Ok(name), Ok(model)) = (Name::new(&name), model) else {
        tracing::warn!(worker = %place.url, "a listed worker is left out: its name or model is no name");
        return None;
    };
    Some(Worker {
        engine: discover.engine,
        model: model.or_else(|| discover.model.clone()),
        api_key: discover.api_key.clone(),
        http2: discover.http2,
        ..Worker::new(name, place.url.clone())
    })
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;
    use crate::config::Server;

    fn worker(name: &str, url: &str) -> Worker {
        Worker::new(Name::new(name).unwrap(), Url::parse(url).unwrap())
    }

    #[test]
    fn no_name_and_no_address_is_given_twice() {
        let ranks = Worker { data_parallel: NonZeroU32::new(2).unwrap(), ..worker("r", "http://r") };
        let model = Model::new(Name::new("m").unwrap(), vec![ranks], &Server::default());
        let mut config = Config { server: Server::default(), nodes: Vec::new(), models: vec![model] };
        let mut enlisted = Enlisted::of(&config);
        for left_out in [worker("r", "http://a"), worker("r/1", "http://b"), worker("other", "http://r")] {
            assert!(!enlisted.add(&mut config.models[0], left_out));
        }
        assert_eq!(config.models[0].workers.len(), 1);
        let second = Worker { model: Some(Name::new("x").unwrap()), ..worker("r/2", "http://r") };
        assert!(enlisted.add(&mut config.models[0], second));
        assert_eq!(config.models[0].workers.len(), 2, "it serves another model there");
    }
}
