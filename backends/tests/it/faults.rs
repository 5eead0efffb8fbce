//! What breaks, and that each way of breaking is told apart, closed and never answered by sending twice.

use std::{collections::HashSet, time::Instant};

use forebay_backends::{
    Error, Phase,
    transport::{Channel, Timeouts},
};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    time::timeout,
};

use crate::support::{PATIENCE, Served, Server, channel, millis, post, until};

fn quick() -> Timeouts {
    Timeouts { first_byte: Some(PATIENCE), idle: PATIENCE, ..Timeouts::default() }
}

/// The first error of an exchange, and how many bytes came before it.
async fn error_of(channel: &Channel) -> (usize, Error) {
    let mut body = match channel.send(post("x")).await {
        Ok(response) => response.body,
        Err(error) => return (0, error),
    };
    let mut bytes = 0;
    loop {
        match body.next().await {
            Some(Ok(piece)) => bytes += piece.len(),
            Some(Err(error)) => {
                assert!(body.next().await.is_none(), "nothing follows an error");
                assert_eq!(channel.idle_connections(), 0, "a broken connection is not kept");
                return (bytes, error);
            }
            None => panic!("ended well after {bytes} bytes"),
        }
    }
}

/// Reads the request, sends these bytes, closes.
async fn sends(bytes: impl Into<Vec<u8>>) -> Server {
    let bytes = bytes.into();
    Server::start(move |mut served| {
        let bytes = bytes.clone();
        async move {
            served.request().await;
            served.send(bytes).await;
        }
    })
    .await
}

#[tokio::test]
async fn answers_that_are_not_http() {
    let many_headers = format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(1000));
    let large_header = format!("HTTP/1.1 200 OK\r\na: {}\r\n\r\n", "x".repeat(70_000));
    let huge_header = format!("HTTP/1.1 200 OK\r\na: {}\r\n\r\n", "x".repeat(200_000));
    let endless_head = format!("HTTP/1.1 200 OK\r\na: {}", "x".repeat(200_000));
    for wire in [
        "\0\0\0\x12\x04\0\0\0\0\0".to_owned(),
        "HTTP/1.1 abc OK\r\n\r\n".to_owned(),
        "HTP/1.1 200 OK\r\n\r\n".to_owned(),
        "220 ready\r\n\r\n".to_owned(),
        "HTTP/1.1 200 OK\r\ncontent-length: minus one\r\n\r\n".to_owned(),
        "HTTP/1.1 200 OK\r\nbad header\r\n\r\n".to_owned(),
        many_headers,
        large_header,
        huge_header,
        endless_head,
    ] {
        let server = sends(wire.clone()).await;
        let (bytes, error) = error_of(&server.channel(quick())).await;
        let start: String = wire.chars().take(40).collect();
        assert!(bytes == 0 && matches!(error, Error::Malformed { .. }), "{start:?}: {error:?}");
        assert_eq!(server.seen.requests(), 1, "{start:?}");
    }
}

#[tokio::test]
async fn a_connection_that_ends_before_the_head_is_complete() {
    for wire in ["", "HTTP/1.1", "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n"] {
        let server = sends(wire).await;
        let (_, error) = error_of(&server.channel(quick())).await;
        assert!(matches!(error, Error::Reset { reused: false, .. }), "{wire:?}: {error:?}");
        assert_eq!((server.seen.connections(), server.seen.requests()), (1, 1), "{wire:?}");
    }
}

#[tokio::test]
async fn bodies_that_break_off() {
    for (wire, before) in [
        ("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc", 3),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n", 3),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\nabc", 3),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n", 3),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffffff\r\nabc", 0),
    ] {
        let server = sends(wire).await;
        let (bytes, error) = error_of(&server.channel(quick())).await;
        assert!(bytes == before && matches!(error, Error::Broken { .. }), "{wire:?}: {bytes} {error:?}");
    }
}

#[tokio::test]
async fn a_worker_that_accepts_and_says_nothing() {
    let server = Server::start(|mut served| async move {
        served.request().await;
        served.closed().await;
    })
    .await;
    let channel = server.channel(Timeouts { first_byte: Some(millis(60)), ..quick() });
    let (_, error) = error_of(&channel).await;
    assert!(matches!(error, Error::Timeout { phase: Phase::FirstByte, .. }), "{error:?}");
    server.tracker.close();
    until("the server saw the connection closed", || server.tracker.len() == 1).await;
}

#[tokio::test]
async fn a_stream_that_stalls() {
    // Before its first byte the engine may queue: the longer limit holds. After it, the shorter one.
    for (sent, first_byte, idle, expected) in
        [("", millis(60), PATIENCE, Phase::FirstByte), ("3\r\nabc\r\n", PATIENCE, millis(60), Phase::Idle)]
    {
        let server = Server::start(move |mut served| async move {
            served.request().await;
            served.send(format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{sent}")).await;
            served.closed().await;
        })
        .await;
        let started = Instant::now();
        let channel = server.channel(Timeouts { first_byte: Some(first_byte), idle, ..Timeouts::default() });
        let (_, error) = error_of(&channel).await;
        assert!(
            matches!(error, Error::Timeout { phase, after } if phase == expected && after == millis(60)),
            "{error:?}"
        );
        assert!(started.elapsed() >= millis(60));
        server.tracker.close();
        until("the server saw the connection closed", || server.tracker.len() == 1).await;
    }
}

#[tokio::test]
async fn the_wait_for_the_first_byte_does_not_outlive_it() {
    let server = Server::start(|mut served| async move {
        served.request().await;
        served.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
        tokio::time::sleep(millis(40)).await;
        served.send("3\r\nabc\r\n").await;
        served.closed().await;
    })
    .await;
    let started = Instant::now();
    let channel = server.channel(Timeouts { first_byte: Some(PATIENCE), idle: millis(60), ..Timeouts::default() });
    let (bytes, error) = error_of(&channel).await;
    assert!(bytes == 3 && matches!(error, Error::Timeout { phase: Phase::Idle, .. }), "{error:?}");
    assert!(started.elapsed() < PATIENCE / 4, "{:?}", started.elapsed());
}

#[tokio::test]
async fn waiting_for_the_first_token_is_not_idling() {
    let server = Server::start(|mut served| async move {
        served.request().await;
        served.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
        tokio::time::sleep(millis(120)).await;
        served.send("3\r\nabc\r\n0\r\n\r\n").await;
        served.closed().await;
    })
    .await;
    for first_byte in [None, Some(PATIENCE)] {
        let channel = server.channel(Timeouts { first_byte, idle: millis(40), ..Timeouts::default() });
        let body = channel.send(post("x")).await.expect("a head").body;
        assert_eq!(body.collect(10).await.expect("a body"), "abc");
    }
}

#[tokio::test]
async fn a_slow_reader_does_not_make_the_worker_look_dead() {
    let server = Server::start(|mut served| async move {
        served.request().await;
        served.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n").await;
        tokio::time::sleep(millis(200)).await;
        served.send("3\r\ndef\r\n0\r\n\r\n").await;
        served.closed().await;
    })
    .await;
    let channel = server.channel(Timeouts { idle: millis(150), ..Timeouts::default() });
    let mut body = channel.send(post("x")).await.expect("a head").body;
    assert_eq!(body.next().await.expect("a piece").expect("bytes"), "abc");
    tokio::time::sleep(millis(160)).await;
    assert_eq!(body.next().await.expect("a piece").expect("the reader's own pause does not count"), "def");
}

#[tokio::test]
async fn a_connection_closed_while_idle_is_replaced() {
    let server = Server::start(|mut served| async move {
        served.request().await;
        served.answer(200, "ok").await;
    })
    .await;
    let channel = server.channel(quick());
    for expected in 1..=5 {
        let answer = channel.send(post("x")).await.expect("an answer");
        assert_eq!(answer.body.collect(2).await.expect("a body"), "ok");
        until("the close is noticed", || channel.idle_connections() == 0).await;
        assert_eq!((server.seen.connections(), server.seen.requests()), (expected, expected));
    }
}

/// Answers the first request of each connection, reads the second and hangs up.
async fn hangs_up_on_the_second(mut served: Served) {
    served.request().await;
    served.answer(200, "ok").await;
    served.request().await;
}

#[tokio::test]
async fn a_request_that_was_written_is_not_sent_again() {
    let server = Server::start(hangs_up_on_the_second).await;
    let channel = server.channel(quick());
    let first = channel.send(post("1")).await.expect("an answer");
    first.body.collect(2).await.expect("a body");
    let error = channel.send(post("2")).await.err().expect("a refusal");
    assert!(matches!(error, Error::Reset { reused: true, .. }), "{error:?}");
    assert_eq!((server.seen.connections(), server.seen.requests()), (1, 2));
}

/// A connection that breaks within an answer was not closed as idle.
#[tokio::test]
async fn an_answer_that_began_is_no_idle_close() {
    for begin in ["HTTP/1.1 20", "HTTP/1.1 100 Continue\r\n\r\n"] {
        let server = Server::start(move |mut served| async move {
            served.request().await;
            served.answer(200, "ok").await;
            served.request().await;
            served.send(begin).await;
        })
        .await;
        let channel = server.channel(Timeouts { keep_alive: PATIENCE, ..Timeouts::default() });
        channel.send(post("1")).await.expect("an answer").body.collect(9).await.expect("a body");
        let broken = channel.send(post("2")).await.err();
        assert!(matches!(broken, Some(Error::Reset { reused: false, .. })), "{begin:?}: {broken:?}");
    }
}

#[tokio::test]
async fn a_question_may_be_asked_again() {
    let server = Server::start(hangs_up_on_the_second).await;
    let channel = server.channel(quick());
    for _ in 0..2 {
        let (status, body) = channel.get("/version", PATIENCE, 10).await.expect("an answer");
        assert_eq!((status.as_u16(), &*body), (200, b"ok".as_slice()));
    }
    assert_eq!((server.seen.connections(), server.seen.requests()), (2, 3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn racing_a_worker_that_closes_never_doubles_a_request() {
    let server = Server::start(|mut served| async move {
        // Odd ones are closed right behind the answer, without a word in the head.
        while served.request().await.is_some() {
            served.answer(200, "ok").await;
            if served.number % 2 == 1 {
                return;
            }
        }
    })
    .await;
    let channel = server.channel(quick());
    let mut answered = 0;
    for number in 0..400 {
        let pair = [channel.send(post(format!("{number}a"))), channel.send(post(format!("{number}b")))];
        for answer in futures::future::join_all(pair).await {
            match answer {
                Ok(answer) => {
                    answered += 1;
                    answer.body.collect(2).await.expect("a body");
                }
                Err(Error::Reset { reused: true, .. }) => {}
                Err(error) => panic!("{error:?}"),
            }
        }
    }
    let seen = server.seen.requests.lock();
    let distinct: HashSet<&[u8]> = seen.iter().map(|request| request.body.as_slice()).collect();
    assert_eq!(distinct.len(), seen.len(), "a request was sent twice");
    assert!(answered > 400, "{answered} of 800");
}

#[tokio::test]
async fn nothing_listens() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    drop(listener);
    let (_, error) = error_of(&channel(&format!("http://{address}"), quick())).await;
    assert!(matches!(error, Error::Connect { .. }), "{error:?}");
    // A name that no resolver has to be asked about.
    let unknown = format!("http://{}.invalid", "x".repeat(64));
    let (_, error) = error_of(&channel(&unknown, Timeouts { connect: PATIENCE, ..quick() })).await;
    assert!(matches!(error, Error::Connect { .. }), "{error:?}");
}

#[tokio::test]
async fn a_host_that_swallows_connections() {
    // A listener that never accepts and whose queue is full: further SYNs are dropped.
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind("127.0.0.1:0".parse().expect("an address")).expect("a port");
    let listener = socket.listen(1).expect("a listener");
    let address = listener.local_addr().expect("an address");
    let mut queued = Vec::new();
    while let Ok(Ok(stream)) = timeout(millis(200), TcpStream::connect(address)).await {
        queued.push(stream);
        assert!(queued.len() < 64, "the queue has a bound");
    }
    let started = Instant::now();
    let (_, error) =
        error_of(&channel(&format!("http://{address}"), Timeouts { connect: millis(100), ..quick() })).await;
    assert!(matches!(error, Error::Timeout { phase: Phase::Connect, .. }), "{error:?}");
    assert!(started.elapsed() < PATIENCE / 4);
}

#[tokio::test]
async fn small_answers_have_bounds() {
    let chunked = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{}", "4\r\nabcd\r\n".repeat(100));
    for wire in [format!("{chunked}0\r\n\r\n"), "HTTP/1.1 200 OK\r\ncontent-length: 9999999999\r\n\r\nabc".to_owned()] {
        let server = sends(wire).await;
        let error = server.channel(quick()).get("/metrics", PATIENCE, 399).await.expect_err("a bound");
        assert!(matches!(error, Error::TooLarge { bytes_max: 399 }), "{error:?}");
    }
    let server = sends(format!("{chunked}0\r\n\r\n")).await;
    let (_, body) = server.channel(quick()).get("/metrics", PATIENCE, 400).await.expect("an answer");
    assert_eq!(body.len(), 400);

    // Drips that never stop: neither limit of a stream would end it.
    let server = Server::start(|mut served| async move {
        served.request().await;
        served.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
        while served.stream.try_write(b"1\r\na\r\n").is_ok() {
            tokio::time::sleep(millis(5)).await;
        }
    })
    .await;
    let error = server.channel(quick()).get("/metrics", millis(100), 1 << 20).await.expect_err("a bound");
    assert!(matches!(error, Error::Timeout { phase: Phase::Whole, .. }), "{error:?}");
}
