"""What the stages that train with TRL share."""
