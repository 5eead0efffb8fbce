//! Faults at random, on the wire: whatever breaks, each request has one outcome, the same at the client and in the journal.
//!
//! Half of the requests are for a model that goes on with streams elsewhere. All workers say the same text, so that what is
//! missing or said twice shows.
//!
//! Twenty seconds, or as many as `FOREBAY_FAULTS_SECONDS` says; what breaks when is drawn from `FOREBAY_FAULTS_SEED`.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::support::body::{chat, long};
use crate::support::client::Connection;
use crate::support::process::{Gateway, Worker, model, tokenizer};
use crate::support::{eventually, within};

const CLIENTS: u64 = 6;
const WORKERS: usize = 3;
const FLAGS: [&str; 3] = ["--model", "m", "--recite"];

/// What a worker may suffer from, most of it now and then only.
const FAULTS: [&str; 14] = [
    r#"{"kind":{"status":{"code":500}},"probability":0.5}"#,
    r#"{"kind":{"status":{"code":503}},"probability":0.5}"#,
    r#"{"kind":{"status":{"code":429,"retry_after":1}},"probability":0.3}"#,
    r#"{"kind":{"hang":{}},"probability":0.2}"#,
    r#"{"kind":{"stall":{}},"probability":0.2}"#,
    r#"{"kind":{"stall":{"after":3}},"probability":0.3}"#,
    r#"{"kind":{"cut":{}},"probability":0.5}"#,
    r#"{"kind":{"cut":{"after":2}},"probability":0.5}"#,
    r#"{"kind":{"cut":{"reset":true}},"probability":0.5}"#,
    r#"{"kind":{"cut":{"after":4,"reset":true}},"probability":0.5}"#,
    r#"{"kind":{"error":{}},"probability":0.5}"#,
    r#"{"kind":{"error":{"after":3}},"probability":0.5}"#,
    r#"{"kind":{"abort":{"after":4}},"probability":0.5}"#,
    r#"{"kind":{"delay":{"ms":700}}}"#,
];

/// SplitMix64.
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % bound
    }
}

/// What a client saw of its request.
#[derive(Debug, PartialEq)]
enum Seen {
    Whole,
    /// The same, from more than one worker.
    GoneOn,
    Cut,
    Refused(u16),
    /// It left in between.
    Left,
}

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().expect("a number"))
}

/// Where to ask, what for, and what every answer begins with.
#[derive(Clone, Copy)]
struct Place<'a> {
    gateway: SocketAddr,
    text: &'a str,
}

fn ask(place: Place<'_>, name: &str, chance: &mut Chance) -> Seen {
    let streamed = chance.below(3) > 0;
    let tokens = 1 + chance.below(12);
    let text = if chance.below(2) == 0 { long(&format!("{}", chance.below(8))) } else { name.to_owned() };
    let mut client = Connection::to(place.gateway);
    let body = chat(&text, &format!(r#","max_tokens":{tokens},"ignore_eos":true,"stream":{streamed}"#));
    let body = if chance.below(2) == 0 { body } else { body.replacen(r#""model":"m""#, r#""model":"goes-on""#, 1) };
    client.post("/v1/chat/completions", &[&format!("x-request-id: {name}")], body.as_bytes());
    if chance.below(12) == 0 {
        sleep(Duration::from_millis(chance.below(300)));
        return Seen::Left;
    }
    let answer = client.answer();
    assert_eq!(answer.header("x-request-id"), Some(name));
    if answer.status != 200 {
        answer.error();
        return Seen::Refused(answer.status);
    }
    if !streamed {
        assert!(!answer.whole || answer.json()["choices"][0]["finish_reason"] == "length", "{}", answer.text());
        return if answer.whole { Seen::Whole } else { Seen::Cut };
    }
    let finishes = answer.events().iter().filter(|event| event.contains(r#""finish_reason":"length""#)).count();
    let said: String = answer.events().iter().filter_map(|event| content(event)).collect();
    assert!(place.text.starts_with(&said), "{said:?}: {}", answer.text());
    match answer.stream_end() {
        Ok(()) => {
            assert_eq!(finishes, 1, "one answer: {}", answer.text());
            if answer.text().contains(r#""forebay":{"continued""#) { Seen::GoneOn } else { Seen::Whole }
        }
        Err(_) => Seen::Cut,
    }
}

/// What a chunk says.
fn content(chunk: &str) -> Option<String> {
    let chunk: serde_json::Value = serde_json::from_str(chunk).ok()?;
    Some(chunk["choices"][0]["delta"]["content"].as_str()?.to_owned())
}

/// One client after the other's pattern, until the time is over.
fn client(number: u64, seed: u64, place: Place<'_>, over: &AtomicBool) -> BTreeMap<String, Seen> {
    let mut chance = Chance(seed.wrapping_add(number << 32));
    let mut seen = BTreeMap::new();
    while !over.load(Ordering::Relaxed) {
        let name = format!("client-{number}-{}", seen.len());
        let outcome = ask(place, &name, &mut chance);
        seen.insert(name, outcome);
        sleep(Duration::from_millis(chance.below(60)));
    }
    seen
}

/// Breaks and mends workers until the time is over; all are well then.
fn break_things(workers: &mut [Worker], mut chance: Chance, until: Instant) {
    while Instant::now() < until {
        let worker = &mut workers[chance.below(WORKERS as u64) as usize];
        match chance.below(10) {
            0 => {
                worker.process.signal("KILL");
                worker.process.wait();
                sleep(Duration::from_millis(chance.below(1500)));
                *worker = Worker::start_at(worker.address.port(), &FLAGS);
            }
            1 => {
                worker.refuse(200 + chance.below(1300) as u32);
                eventually("it to listen again", || TcpStream::connect(worker.address).is_ok().then_some(()));
            }
            2 | 3 => worker.faults("[]"),
            _ => worker.faults(&format!("[{}]", FAULTS[chance.below(FAULTS.len() as u64) as usize])),
        }
        sleep(Duration::from_millis(chance.below(600)));
    }
    workers.iter().for_each(|worker| worker.faults("[]"));
}

#[test]
fn each_request_has_one_outcome_whatever_breaks() {
    let time = Duration::from_secs(from_environment("FOREBAY_FAULTS_SECONDS", 20));
    let seed = from_environment("FOREBAY_FAULTS_SEED", 1);
    let mut workers: Vec<_> = (0..WORKERS).map(|_| Worker::start(&FLAGS)).collect();
    let addresses: Vec<_> = workers.iter().map(|worker| worker.address).collect();
    let extra = format!(
        "tokenizer = {:?}\nfirst_byte_seconds = 2\nidle_seconds = 2\nqueue_seconds_max = 5\nhedge_after_ms = 300\n",
        tokenizer()
    );
    let going_on = model("goes-on", &addresses, &format!("{extra}continue_streams = true\n"));
    let going_on = going_on.replace("name = \"w", "model = \"m\"\nname = \"c");
    let gateway = Gateway::start(&(model("m", &addresses, &extra) + &going_on));
    let first = gateway.post("/v1/chat/completions", &chat("hello", r#","max_tokens":40"#));
    let recited = first.json();
    let text = recited["choices"][0]["message"]["content"].as_str().expect("a text");
    let (place, over) = (Place { gateway: gateway.client, text }, AtomicBool::new(false));
    let seen: BTreeMap<String, Seen> = std::thread::scope(|scope| {
        let over = &over;
        let clients: Vec<_> =
            (0..CLIENTS).map(|number| scope.spawn(move || client(number, seed, place, over))).collect();
        break_things(&mut workers, Chance(seed), Instant::now() + time);
        over.store(true, Ordering::Relaxed);
        clients.into_iter().flat_map(|client| client.join().expect("a client without a complaint")).collect()
    });

    // Who left at once may not have been heard at all.
    let stayed = seen.values().filter(|seen| **seen != Seen::Left).count();
    let is_of_one_who_stayed = |row: &serde_json::Value| {
        row["request"].as_str().and_then(|name| seen.get(name)).is_some_and(|seen| *seen != Seen::Left)
    };
    let rows = eventually("every row", || {
        Some(gateway.rows()).filter(|rows| rows.iter().filter(|row| is_of_one_who_stayed(row)).count() >= stayed)
    });
    let mut outcomes = BTreeMap::new();
    for row in rows.iter().filter(|row| row["request"] != *first.header("x-request-id").expect("a name")) {
        let name = row["request"].as_str().expect("a name").to_owned();
        assert!(seen.contains_key(&name), "a row for nobody: {row}");
        assert!(outcomes.insert(name, row).is_none(), "two rows for one request: {row}");
    }
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for (name, seen) in &seen {
        let Some(row) = outcomes.get(name) else {
            assert_eq!(*seen, Seen::Left, "no row for {name}");
            continue;
        };
        let outcome = row["outcome"].as_str().expect("an outcome");
        *counts.entry(outcome.to_owned()).or_default() += 1;
        let fits = match seen {
            Seen::Whole => outcome == "completed",
            Seen::GoneOn => outcome == "completed" && row["attempts"].as_u64() > Some(1),
            Seen::Cut => outcome == "cut",
            Seen::Refused(status) => row["status"] == *status && matches!(outcome, "failed" | "refused"),
            Seen::Left => true,
        };
        assert!(fits, "seed {seed}: the client saw {seen:?}, the journal says {row}");
    }
    let gone_on = seen.values().filter(|seen| **seen == Seen::GoneOn).count();
    println!("seed {seed}, {time:?}: {counts:?}, {gone_on} of them from several workers");
    assert!(gone_on > 0, "none was gone on with");
    assert!(counts["completed"] > seen.len() / 2, "{counts:?}");

    // Nothing is left behind.
    eventually("all places to be given back", || {
        let promised = |worker| gateway.metric(&format!("forebay_worker_promised_tokens{{worker=\"{worker}\"}}"));
        let workers = (0..WORKERS).flat_map(|worker| [format!("w{worker}"), format!("c{worker}")]);
        (workers.map(promised).sum::<f64>() + gateway.queued() == 0.0).then_some(())
    });
    // One that failed again and again is left alone for up to a minute.
    within(Duration::from_secs(120), "all workers to be well", || {
        let asked = chat("well again", r#","max_tokens":1"#);
        let asked = [asked.replacen(r#""model":"m""#, r#""model":"goes-on""#, 1), asked];
        let answered = asked.map(|body| gateway.post("/v1/chat/completions", &body).status == 200);
        let up = |worker| gateway.metric(&format!("forebay_worker_up{{worker=\"{worker}\"}}"));
        let workers = (0..WORKERS).flat_map(|worker| [format!("w{worker}"), format!("c{worker}")]);
        (answered == [true; 2] && workers.map(up).sum::<f64>() == 2.0 * WORKERS as f64).then_some(())
    });
}
