//! A scripted guest agent.
